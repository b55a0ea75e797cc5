"""What a key-value cache has to remember when tokens were dropped before or inside it: which columns it holds.

transformers counts positions and masks in tokens that the model has *seen*; a cache behind a cut *holds* fewer, and
behind a cut between decoder layers each layer holds its own number.  The difference belongs to the cache object, and
goes where it goes: to a second turn, through deepcopy, and away with it.

Two accounts nest.  The *prompt's* columns say which of the original tokens the language model was handed; a *layer's*
columns say which of those it still holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

_SLOT = "_mmaccel_account"

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

    @property
    def dropped(self) -> int:
        """How many columns fewer there are than what they stand for."""
        return self.seen - self.index.shape[1]


class OfRows(Protocol):
    """What a method that evicts remembers of a cache's rows."""

    def mapped(self, rows: Callable[[Tensor], Tensor]) -> OfRows:
        """The same of other rows."""


@dataclass(frozen=True)
class Account:
    """What a cache remembers: columns of the prompt, None if the language model read all of it, and of its layers.

    rows: what a method that evicts remembers of the rows.
    """

    prompt: KeptColumns | None = None
    layers: Mapping[int, KeptColumns] = field(default_factory=dict)
    rows: OfRows | None = None

    def mapped(self, change: Callable[[KeptColumns], KeptColumns]) -> Account:
        """The account with every set of columns changed; layers that share theirs go on sharing them."""
        changed = {id(columns): change(columns) for columns in self.all()}
        prompt = None if self.prompt is None else changed[id(self.prompt)]
        layers = {layer: changed[id(columns)] for layer, columns in self.layers.items()}
        return replace(self, prompt=prompt, layers=layers)

    def all(self) -> list[KeptColumns]:
        """Every set of columns, each once."""
        prompt = [] if self.prompt is None else [self.prompt]
        return list({id(columns): columns for columns in (*prompt, *self.layers.values())}.values())


def held_length(cache: Any) -> int:
    """The number of columns that the language model was handed, whatever its layers let go of later."""
    return _held_offset(cache)


def shown_length(cache: Any, layer: int) -> int:
    """The number of columns that a mask shows a layer: all that were handed on, or what its window leaves of them."""
    if cache is None or layer >= len(cache.layers) or not cache.layers[layer].is_initialized:
        return 0
    columns = layer_columns(cache).get(layer)
    held: int = cache.layers[layer].keys.shape[-2] + (0 if columns is None else columns.dropped)
    return min(held, window_length(cache.layers[layer]))


def window_length(layer: Any) -> int:
    """The number of past columns that a layer of a cache keeps in sight, if it has a window; else no limit."""
    return int(layer.sliding_window) - 1 if getattr(layer, "is_sliding", False) else sys.maxsize


def kept_columns(cache: Any) -> KeptColumns | None:
    """Which tokens of the prompt the language model was handed, if not all."""
    return None if cache is None else _account(cache).prompt


def layer_columns(cache: Any) -> Mapping[int, KeptColumns]:
    """By layer, which of the columns that the language model was handed it holds; layers that hold all are absent."""
    return {} if cache is None else _account(cache).layers


def remember(cache: Any, columns: KeptColumns) -> None:
    """Stores the prompt's columns on the cache, whose `get_seq_length` counts original tokens from now on."""
    _keep_account(cache, replace(_account(cache), prompt=columns))


def remember_layers(cache: Any, layers: Mapping[int, KeptColumns]) -> None:
    """Stores the layers' columns on the cache, whose lengths no longer are any one layer's."""
    _keep_account(cache, replace(_account(cache), layers=dict(layers)))


def rows_of(cache: Any) -> OfRows | None:
    """What a method that evicts remembers of the cache's rows."""
    return _account(cache).rows


def remember_rows(cache: Any, rows: OfRows) -> None:
    """Stores on the cache what a method that evicts wants to know again at the next step; it goes where its rows go."""
    _keep_account(cache, replace(_account(cache), rows=rows))


def cache_bytes(cache: Any) -> tuple[int, int]:
    """Bytes of all keys and values, and what they would be had no token been dropped."""
    seen, held, dense = int(cache.get_seq_length()), 0, 0
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if tensor is not None and tensor.numel():
                held += tensor.nbytes
                dense += tensor.nbytes // tensor.shape[-2] * min(seen, window_length(layer))
    return held, dense


def _account(cache: Any) -> Account:
    found: Account = vars(cache).get(_SLOT, Account())
    return found


def _keep_account(cache: Any, account: Account) -> None:
    """The offset of queries into the held columns (causal masks) still counts what is held, but see `masking_original`.

    The methods come with the cache's class, not as attributes: a method bound to the cache and stored on it would be a
    cycle, and the cache's memory would wait for the garbage collector.
    """
    cache.__class__ = _counting_original(_plain_class(cache))
    vars(cache)[_SLOT] = account


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
        "reorder_cache": _reorder,
        "batch_repeat_interleave": _repeat,
        "batch_select_indices": _select,
    }
    return type(plain.__name__, (plain,), {"__module__": plain.__module__, **methods})


def _seen_length(cache: Any, layer_idx: int = 0) -> int:
    prompt = _account(cache).prompt
    return _held_offset(cache, layer_idx) + (0 if prompt is None else prompt.dropped)


def _held_offset(cache: Any, layer_idx: int = 0) -> int:
    columns = _account(cache).layers.get(layer_idx)
    return int(_plain_class(cache).get_seq_length(cache, layer_idx)) + (0 if columns is None else columns.dropped)


def _query_offset(cache: Any, layer_idx: int = 0) -> int:
    return _seen_length(cache, layer_idx) if masking_original.get() else _held_offset(cache, layer_idx)


def _mask_sizes(cache: Any, query_length: int, layer_idx: int) -> tuple[int, int]:
    """Masks are made for all columns that were handed on; each layer then takes its own out of them."""
    if masking_original.get():
        return _seen_length(cache, layer_idx) + query_length, 0
    if layer_idx in _account(cache).layers:
        return _held_offset(cache, layer_idx) + query_length, 0
    sizes: tuple[int, int] = _plain_class(cache).get_mask_sizes(cache, query_length, layer_idx)
    return sizes


def _crop_tail(cache: Any, tokens_to_remove: int) -> None:
    if _account(cache).rows is not None:
        raise ValueError(
            "a cache that lets go of tokens while it grows cannot be cropped, so neither can a guess be taken back: "
            "leave assistant_model and prompt_lookup_num_tokens unset"
        )
    account = vars(cache)[_SLOT] = _account(cache).mapped(KeptColumns.trimmed)
    held = held_length(cache)
    tail = min(
        held - (columns.index.shape[1] if columns is account.prompt else columns.seen) for columns in account.all()
    )
    if tokens_to_remove > 0 or -tokens_to_remove > tail:
        raise ValueError(
            f"only the {tail} tokens behind the last dropped one can be cropped from a cache whose visual tokens were "
            f"dropped, as a negative count; got {tokens_to_remove}"
        )
    _plain_class(cache).crop(cache, tokens_to_remove)


def _reorder(cache: Any, beam_idx: Tensor) -> None:
    _plain_class(cache).reorder_cache(cache, beam_idx)
    _pick_rows(cache, lambda index: index.index_select(0, beam_idx.to(index.device)))


def _repeat(cache: Any, repeats: int) -> None:
    _plain_class(cache).batch_repeat_interleave(cache, repeats)
    _pick_rows(cache, lambda index: index.repeat_interleave(repeats, dim=0))


def _select(cache: Any, indices: Tensor) -> None:
    _plain_class(cache).batch_select_indices(cache, indices)
    _pick_rows(cache, lambda index: index[torch.as_tensor(indices, device=index.device)])


def _pick_rows(cache: Any, rows: Callable[[Tensor], Tensor]) -> None:
    account = _account(cache).mapped(lambda columns: replace(columns, index=rows(columns.index)))
    vars(cache)[_SLOT] = replace(account, rows=None if account.rows is None else account.rows.mapped(rows))
