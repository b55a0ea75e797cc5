"""The laws of methods that evict tokens from the cache, measured against masks with no mechanism in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmaccel.checks import LawResult
from vision_tokens.decoder_laws import layers_of_last_call
from vision_tokens.encoding import is_running_dense
from vision_tokens.families import find_host
from vision_tokens.kept_columns import KeptColumns, held_length, kept_columns, layer_columns
from vision_tokens.laws import exactness_laws, generated, kept_prompt, masked_logits

if TYPE_CHECKING:
    from vision_tokens.cache_methods import CacheMethod
    from vision_tokens.output_gate import OutputGate


@dataclass
class History:
    """What each layer held behind every forward of the language model; the marks are [layers, batch, seen]."""

    held: list[Bool[Tensor, "layers batch _"]] = field(default_factory=list)

    def visible(
        self, total: int, reading: Mapping[int, Bool[Tensor, "batch tokens"]]
    ) -> dict[int, Bool[Tensor, "batch total total"]]:
        """By layer, which tokens each token of the whole sequence saw, or might have but for its mask.

        reading: by layer, which tokens of the prompt it worked on, where that is not all.
        """
        layers, batch, _ = self.held[0].shape
        shown = torch.ones(layers, batch, total, total, dtype=torch.bool, device=self.held[0].device)
        for layer, marks in reading.items():
            shown[layer, :, :, : marks.shape[1]] = marks[:, None]
        for before, after in zip(self.held, self.held[1:], strict=False):
            past, now = before.shape[-1], after.shape[-1]
            shown[:, :, past:now, :past] = before[:, :, None]
            shown[:, :, past:now, past:] = True
        return dict(enumerate(shown))


def places_held(cache: Any, layers: int) -> Bool[Tensor, "layers batch seen"]:
    """Which of the original tokens each layer holds."""
    held, seen, prompt = held_length(cache), cache.get_seq_length(), kept_columns(cache)
    keys = cache.layers[0].keys
    everything = KeptColumns.all_kept(len(keys), keys.device)
    original = (prompt or everything).extended(held)
    marks = torch.zeros(layers, len(keys), seen + 1, dtype=torch.bool, device=keys.device)
    for layer in range(layers):
        columns = layer_columns(cache).get(layer, everything)
        index = columns.extended(held - columns.dropped)
        index = torch.where(index >= 0, original.gather(1, index.clamp(min=0)), -1)
        marks[layer].scatter_(1, torch.where(index >= 0, index, seen), True)
    return marks[..., :seen]


@contextmanager
def watched(model: nn.Module) -> Iterator[History]:
    """Notes what the cache holds behind every forward within the block."""
    host, history = find_host(model), History()

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not is_running_dense():
            history.held.append(places_held(output.past_key_values, len(host.decoder_layers)))

    handle = host.text.register_forward_hook(note, with_kwargs=True)
    try:
        yield history
    finally:
        handle.remove()


def evicted_logits(
    model: nn.Module, inputs: Mapping[str, Any], tokens: Int[Tensor, "batch new"], history: History
) -> Float[Tensor, "batch new vocabulary"]:
    """The slow reference: all tokens in one forward without a cache, each seeing what was held when it came.

    model: decorated, and called with these inputs last, when `history` was noted.
    """
    prompt = inputs["input_ids"].shape[1]
    shown = history.visible(prompt + tokens.shape[1] - 1, layers_of_last_call(model, prompt))
    return masked_logits(model, kept_prompt(model, inputs), tokens, shown)


def cache_laws(
    model: nn.Module, method: CacheMethod | OutputGate, inputs: Mapping[str, Any], tokens: int = 8
) -> Iterator[LawResult]:
    """The laws of exactness of a method that lets go of tokens in the cache."""

    def reference(chosen: Tensor) -> Tensor:
        with watched(model) as history:
            generated(model, inputs, tokens)
        return evicted_logits(model, inputs, chosen, history)

    references = {"evicting equals masking from then on": reference} if method.positions == "kept" else {}
    yield from exactness_laws(model, method, method.with_budget(1.0), references, inputs, tokens)
