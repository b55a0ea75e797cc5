"""What a key-value cache has to remember when tokens were dropped before it: which columns it holds.

transformers counts positions and masks in tokens that the model has *seen*; a cache behind a cut *holds* fewer.  The
difference belongs to the cache object, and goes where it goes: to a second turn, through deepcopy, and away with it.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

_SLOT = "_kept_columns"

masking_original: ContextVar[bool] = ContextVar("masking_original", default=False)
"""Whether masks that are made now, from a cache behind a cut, are to have a column for every token that it has seen.

So multimodal models make them for their language model: windows and blocks are laid out on original places, and the
mechanism then gathers the columns that are held.  Else masks have a column for every token held.
"""


@dataclass(frozen=True)
class KeptColumns:
    """For the first columns of a cache, the place in the original sequence of the token behind each.

    index: -1 where a column is padding.  seen: length of the original sequence that these columns stand for; columns
    beyond them follow it one to one.  padded: whether any column is padding.
    """

    index: Int[Tensor, "batch columns"]
    seen: int
    padded: bool

    @classmethod
    def all_kept(cls, batch: int, device: torch.device) -> KeptColumns:
        """For a cache before which nothing was dropped so far: all its columns follow one to one."""
        return cls(torch.empty(batch, 0, dtype=torch.long, device=device), seen=0, padded=False)

    def extended(self, held: int) -> Int[Tensor, "batch held"]:
        """The original place of all `held` columns that the cache has by now."""
        tail = torch.arange(self.seen, self.seen + held - self.index.shape[1], device=self.index.device)
        return torch.cat([self.index, tail.expand(len(self.index), -1)], dim=-1)

    def trimmed(self) -> KeptColumns:
        """The same without its last columns that follow one to one, as those beyond it do: text after the last cut."""
        width = self.index.shape[1]
        follows = (self.index == torch.arange(self.seen - width, self.seen, device=self.index.device)).all(dim=0)
        last = int(follows.logical_not().nonzero().max()) + 1 if not bool(follows.all()) else 0
        return KeptColumns(self.index[:, :last], self.seen - (width - last), self.padded)


def held_length(cache: Any) -> int:
    """The number of columns in the cache; layers with a window hold the last of them."""
    return int(_plain_class(cache).get_seq_length(cache))


def shown_length(cache: Any, layer: int) -> int:
    """The number of columns that a layer of the cache shows to new queries: all it holds, or what its window leaves."""
    if cache is None or layer >= len(cache.layers) or not cache.layers[layer].is_initialized:
        return 0
    held: int = cache.layers[layer].keys.shape[-2]
    return min(held, window_length(cache.layers[layer]))


def window_length(layer: Any) -> int:
    """The number of past columns that a layer of a cache keeps in sight, if it has a window; else no limit."""
    return int(layer.sliding_window) - 1 if getattr(layer, "is_sliding", False) else sys.maxsize


def kept_columns(cache: Any) -> KeptColumns | None:
    """What `remember` stored on the cache, if anything."""
    return None if cache is None else vars(cache).get(_SLOT)


def remember(cache: Any, columns: KeptColumns) -> None:
    """Stores the columns on the cache, whose `get_seq_length` counts original tokens from now on.

    The offset of queries into the held columns (causal masks) still counts what is held, but see `masking_original`.
    The methods come with the cache's class, not as attributes: a method bound to the cache and stored on it would be a
    cycle, and the cache's memory would wait for the garbage collector.
    """
    cache.__class__ = _counting_original(_plain_class(cache))
    vars(cache)[_SLOT] = columns


def _plain_class(cache: Any) -> Any:
    return type(cache).__base__ if _SLOT in vars(cache) else type(cache)


@lru_cache(maxsize=32)
def _counting_original(plain: type) -> type:
    """The subclass, of the same name, for caches behind a cut."""
    methods = {
        "get_seq_length": _seen_length,
        "get_query_offset": _query_offset,
        "get_mask_sizes": _mask_sizes,
        "crop": _crop_tail,
    }
    return type(plain.__name__, (plain,), {"__module__": plain.__module__, **methods})


def _seen_length(cache: Any, layer_idx: int = 0) -> int:
    columns: KeptColumns = vars(cache)[_SLOT]
    return _held_offset(cache, layer_idx) + columns.seen - columns.index.shape[1]


def _held_offset(cache: Any, layer_idx: int = 0) -> int:
    return int(_plain_class(cache).get_seq_length(cache, layer_idx))


def _query_offset(cache: Any, layer_idx: int = 0) -> int:
    return _seen_length(cache, layer_idx) if masking_original.get() else _held_offset(cache, layer_idx)


def _mask_sizes(cache: Any, query_length: int, layer_idx: int) -> tuple[int, int]:
    if masking_original.get():
        return _seen_length(cache, layer_idx) + query_length, 0
    sizes: tuple[int, int] = _plain_class(cache).get_mask_sizes(cache, query_length, layer_idx)
    return sizes


def _crop_tail(cache: Any, tokens_to_remove: int) -> None:
    columns = vars(cache)[_SLOT] = vars(cache)[_SLOT].trimmed()
    tail = held_length(cache) - columns.index.shape[1]
    if tokens_to_remove > 0 or -tokens_to_remove > tail:
        raise ValueError(
            f"only the {tail} tokens behind the last dropped one can be cropped from a cache whose visual tokens were "
            f"dropped, as a negative count; got {tokens_to_remove}"
        )
    _plain_class(cache).crop(cache, tokens_to_remove)
