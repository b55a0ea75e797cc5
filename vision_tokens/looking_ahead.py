"""Showing a method the attention that a decoder layer is about to compute, ahead of the layer itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from mmaccel.methods import Unsupported
from vision_tokens.attention_rows import Reader, recording, unrecorded


class _Seen(Exception):
    """Ends a layer's forward as soon as its attention was seen."""


def look_ahead(
    layer: nn.Module, attention: nn.Module, read: Reader, hidden: Tensor, kwargs: Mapping[str, Any]
) -> Tensor:
    """What `read` makes of the attention that the layer would compute from `hidden`; the layer is stopped there.

    Costs the layer's query, key and value projections once more.  The cache stays as it is.
    """
    found: list[Tensor] = []
    cache = kwargs.get("past_key_values")

    def seen(*shown: Any) -> Tensor:
        found.append(read(*shown))
        raise _Seen

    with unrecorded(), recording({attention: seen}), torch.no_grad(), suppress(_Seen):
        layer.forward(hidden, **{**kwargs, "past_key_values": None if cache is None else Peek(cache)})
    return found[0]


class Peek:
    """A cache that shows a layer its past and what it would add, and adds nothing."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The layer's keys and values with these behind them."""
        layers = self.cache.layers
        past = layers[layer_idx] if layer_idx < len(layers) else None
        if past is None or past.keys is None or past.keys.numel() == 0:
            return keys, values
        return torch.cat([past.keys, keys], dim=-2), torch.cat([past.values, values], dim=-2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def attention_of(layer: nn.Module) -> nn.Module:
    """A decoder layer's attention module.  Raises `Unsupported` unless there is exactly one."""
    found = [module for module in layer.modules() if hasattr(module, "is_causal")]
    if len(found) != 1:
        raise Unsupported(
            f"a {type(layer).__name__} has {len(found)} attention modules; methods that read a decoder layer's "
            "attention need one"
        )
    return found[0]
