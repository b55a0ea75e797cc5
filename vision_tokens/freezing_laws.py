"""The laws of freezing visual tokens in decoder layers, measured against the dense model with its outputs put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmaccel.checks import LawResult
from vision_tokens.families import find_host
from vision_tokens.families.facts import PIXELS
from vision_tokens.laws import exactness_laws, kept_prompt, masked_logits
from vision_tokens.looking_ahead import attention_of
from vision_tokens.prompts import placeholders_in

if TYPE_CHECKING:
    from vision_tokens.shortv import ShortV


def frozen_logits(
    model: nn.Module, method: ShortV, inputs: Mapping[str, Any], tokens: Int[Tensor, "batch new"]
) -> Float[Tensor, "batch new vocabulary"]:
    """The slow reference: every token works in every layer, and what a frozen layer did to visual tokens is undone."""
    host = find_host(model)
    kinds = [kind for kind in host.tokens if inputs.get(PIXELS[kind]) is not None]
    visual = torch.stack([placeholders_in(host, inputs, kind) for kind in kinds]).any(dim=0)
    prompt = kept_prompt(model, inputs)
    with ExitStack() as undo:
        for number in method.frozen(len(host.decoder_layers)):
            layer = host.decoder_layers[number]
            if method.ffn:
                hook = attention_of(layer).register_forward_hook(partial(_silence, visual))
            else:
                hook = layer.register_forward_hook(partial(_put_back, visual), with_kwargs=True)
            undo.callback(hook.remove)
        return masked_logits(model, prompt, tokens)


def _put_back(visual: Bool[Tensor, "batch prompt"], layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
    hidden, marks = args[0] if args else kwargs["hidden_states"], visual[..., None]
    length = visual.shape[1]
    restored = torch.where(marks, hidden[:, :length], output[:, :length])
    return torch.cat([restored, output[:, length:]], dim=1)


def _silence(visual: Bool[Tensor, "batch prompt"], attention: nn.Module, args: Any, output: Any) -> Any:
    hidden, length = output[0], visual.shape[1]
    silent = hidden[:, :length].masked_fill(visual[..., None], 0)
    return (torch.cat([silent, hidden[:, length:]], dim=1), *output[1:])


def freezing_laws(model: nn.Module, method: ShortV, inputs: Mapping[str, Any], tokens: int = 8) -> Iterator[LawResult]:
    """The laws of exactness of a method that freezes visual tokens."""

    def reference(chosen: Tensor) -> Tensor:
        return frozen_logits(model, method, inputs, chosen)

    references = {"freezing equals undoing what a layer did": reference}
    yield from exactness_laws(model, method, method.with_budget(1.0), references, inputs, tokens)
