"""The laws of methods that drop tokens between decoder layers, measured against masks with no mechanism in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmaccel.api import report
from mmaccel.checks import LawResult
from vision_tokens.laws import exactness_laws, kept_prompt, masked_logits

if TYPE_CHECKING:
    from vision_tokens.decoder_layers import DecoderMethod


def layers_of_last_call(model: nn.Module, tokens: int) -> dict[int, Bool[Tensor, "batch tokens"]]:
    """By layer, which of the prompt's tokens the layer worked on in the last call that read one, if not on all."""
    details, keep = report(model).details, {}
    for layer, columns in details.get("layer_columns", {}).items():
        index = columns.index
        if (prompt := details.get("prompt_columns")) is not None:
            index = torch.where(index >= 0, prompt.index.gather(1, index.clamp(min=0)), -1)
        marks = torch.zeros(len(index), tokens + 1, dtype=torch.bool, device=index.device)
        keep[layer] = marks.scatter(1, index.where(index >= 0, tokens), True)[:, :tokens]
    return keep


def layerwise_masked_logits(
    model: nn.Module, inputs: Mapping[str, Any], tokens: Int[Tensor, "batch new"]
) -> Float[Tensor, "batch new vocabulary"]:
    """The slow reference: all tokens in every layer, without a cache; each masks what it dropped in the last call.

    model: decorated, and called with these inputs last.
    """
    layers = layers_of_last_call(model, inputs["input_ids"].shape[1])
    return masked_logits(model, kept_prompt(model, inputs), tokens, layers)


def decoder_laws(
    model: nn.Module, method: DecoderMethod, inputs: Mapping[str, Any], tokens: int = 8
) -> Iterator[LawResult]:
    """The laws of exactness of a method that drops tokens between decoder layers."""

    def reference(chosen: Tensor) -> Tensor:
        return layerwise_masked_logits(model, inputs, chosen)

    exact = method.positions == "kept" and not method.merges
    references = {"dropping in a layer equals masking from it on": reference} if exact else {}
    yield from exactness_laws(model, method, method.with_budget(1.0), references, inputs, tokens)
