"""What each layer's cache may hold, and how columns leave its keys and values.

Pure functions on a transformers cache: `vision_tokens.cache_eviction` calls them while a model runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vision_tokens.kept_columns import (
    KeptColumns,
    held_length,
    layer_columns,
    remember_layers,
    remember_rows,
    rows_of,
    window_length,
)

if TYPE_CHECKING:
    from vision_tokens.cache_methods import CacheMethod


@dataclass(frozen=True)
class Room:
    """What each layer may hold of each row; [batch, layers], on the CPU.

    held: tokens that it holds.  allowed: tokens that it might hold when `later` others came; shares: what goes of
    those.  slot: the place, among the tokens held, where room is made.
    """

    held: Int[Tensor, "batch layers"]
    allowed: Float[Tensor, "batch layers"]
    later: Int[Tensor, "batch layers"]
    shares: Float[Tensor, "batch layers"]
    slot: Int[Tensor, "batch layers"]

    def mapped(self, rows: Callable[[Tensor], Tensor]) -> Room:
        """The same of other rows."""
        return Room(*(rows(getattr(self, name)) for name in self.__dataclass_fields__))

    def grown(self, tokens: int) -> Room:
        """The same once so many more tokens came, and all of them are held."""
        return replace(self, held=self.held + tokens, later=self.later + tokens)

    def total(self) -> Float[Tensor, "batch layers"]:
        """The tokens that it may hold by now."""
        return self.allowed + self.later * (1 - self.shares)

    def due(self) -> Bool[Tensor, "batch layers"]:
        """Where a token too many is held."""
        return (self.held - self.total()).floor() > 0


@dataclass(frozen=True)
class Scored:
    """One layer's scores of the prompt's tokens.  real: which of them are no padding; None if all."""

    scores: Float[Tensor, "batch tokens"]
    real: Bool[Tensor, "batch tokens"] | None = None

    def row(self, number: int) -> Float[Tensor, " real"]:
        """The scores of a row's real tokens."""
        return self.scores[number] if self.real is None else self.scores[number][self.real[number]]

    def spread(self, number: int, marks: Bool[Tensor, " real"]) -> Bool[Tensor, " tokens"]:
        """Marks of a row's real tokens, as marks of all."""
        if self.real is None:
            return marks
        return torch.zeros_like(self.real[number]).masked_scatter(self.real[number], marks)

    def last(self, tokens: int) -> Scored:
        """Of the last tokens alone."""
        return Scored(self.scores[:, -tokens:], None if self.real is None else self.real[:, -tokens:])


def prune(
    cache: Any, method: CacheMethod, scored: Mapping[int, Scored], tokens: Sequence[int], new: int
) -> list[list[float]]:
    """Evicts, from a cache that has just taken in a prompt, what the method lets go of it.

    scored: by layer; layers that are absent keep all.  tokens: how many of the prompt's `new` columns are no padding,
    by row.
    Returns, by row, the share that the method wants each layer to evict.
    """
    numbers, seen = list(scored), held_length(cache)
    scored = {number: found.last(cache.layers[number].keys.shape[2]) for number, found in scored.items()}
    places = {number: held_places(cache, number, seen) for number in numbers}
    past = {number: places[number][:, : -found.scores.shape[1]] for number, found in scored.items()}
    room = _room_with(cache, tokens, seen - new)
    keep: dict[int, list[Tensor]] = {number: [] for number in numbers}
    shares = [[0.0] * len(cache.layers) for _ in tokens]
    for row in range(len(tokens)):
        scores = [found.row(row) for found in scored.values()]
        lengths = [len(score) for score in scores]
        plan = method.plan(pad_sequence(scores, batch_first=True), lengths, numbers, first=seen == new)
        for layer, (number, found) in enumerate(scored.items()):
            keep[number].append(found.spread(row, plan.keep[layer, : lengths[layer]]))
            held, shares[row][number] = lengths[layer] - plan.counts[layer], plan.shares[layer]
            if window_length(cache.layers[number]) < sys.maxsize:  # its window bounds what it holds from now on
                held += int((past[number][row] >= 0).sum())
                room.allowed[row, number], room.later[row, number] = held, 0
            else:
                held += int(room.held[row, number]) - tokens[row]
                room.shares[row, number] = plan.shares[layer]
            room.held[row, number], room.slot[row, number] = held, min(method.slot(held), held - 1)
    columns = dict(layer_columns(cache))
    for number, layer in enumerate(cache.layers):
        if number not in scored and window_length(layer) < sys.maxsize:  # its mask spans all columns from now on
            index = held_places(cache, number, seen)
            columns[number] = KeptColumns(index, seen, padded=bool((index < 0).any()))
            layer.cumulative_length = layer.keys.shape[2]
    for number in numbers:
        kept = torch.cat([past[number] >= 0, torch.stack(keep[number])], dim=-1)
        local = packed(kept, int(room.held[:, number].max()))
        gather_columns(cache.layers[number], local)
        index = torch.where(local >= 0, places[number].gather(1, local.clamp(min=0)), -1)
        padded = len(set(room.held[:, number].tolist())) > 1
        columns[number] = KeptColumns(index, seen, padded)
    remember_layers(cache, columns)
    remember_rows(cache, room)
    return shares


def make_room(cache: Any) -> None:
    """After one more token: lets go of one token in each layer that may not grow."""
    room = rows_of(cache)
    if not isinstance(room, Room):
        return
    room, seen, columns = room.grown(1), held_length(cache), dict(layer_columns(cache))
    due = room.due()
    room = replace(room, held=room.held - due.int())
    for number in due.any(dim=0).nonzero().flatten().tolist():
        index, slots = held_places(cache, number, seen), room.slot[:, number].tolist()
        if not columns[number].padded and bool(due[:, number].all()) and len(set(slots)) == 1:
            drop_column(cache.layers[number], slots[0])
            index, padded = torch.cat([index[:, : slots[0]], index[:, slots[0] + 1 :]], dim=-1), False
        else:
            index = _with_holes(index, slots, due[:, number])
            width = int(room.held[:, number].max())
            if width < index.shape[1]:
                local = packed(index >= 0, width)
                gather_columns(cache.layers[number], local)
                index = torch.where(local >= 0, index.gather(1, local.clamp(min=0)), -1)
            padded = bool((room.held[:, number] < width).any())
        columns[number] = KeptColumns(index, seen, padded)
    remember_layers(cache, columns)
    remember_rows(cache, room)


def _with_holes(
    index: Int[Tensor, "batch held"], slots: Sequence[int], due: Bool[Tensor, " batch"]
) -> Int[Tensor, "batch held"]:
    """The columns with the token at each row's slot, counted among those that are no padding, gone where it is due."""
    slot, due = (torch.as_tensor(value, device=index.device)[:, None] for value in (slots, due))
    real = index >= 0
    return index.masked_fill(due & real & (real.cumsum(dim=-1) == slot + 1), -1)


def _room_with(cache: Any, tokens: Sequence[int], past: int) -> Room:
    """The room for a prompt's tokens and all before them, before anything is evicted."""
    before, new = rows_of(cache), torch.tensor(tokens)[:, None].expand(-1, len(cache.layers)).clone()
    if isinstance(before, Room):
        held, allowed = before.held, before.total()
    else:
        held = torch.full_like(new, past)
        allowed = held.double()
    return Room(held + new, allowed, new, torch.zeros_like(allowed), torch.zeros_like(new))


def held_places(cache: Any, number: int, seen: int) -> Int[Tensor, "batch held"]:
    """The place, among the `seen` columns that were handed on, of each one that a layer has in its cache."""
    keys = cache.layers[number].keys
    columns = layer_columns(cache).get(number) or KeptColumns.all_kept(len(keys), keys.device)
    return columns.extended(seen - columns.dropped)[:, -keys.shape[2] :]


def packed(keep: Bool[Tensor, "batch held"], width: int) -> Int[Tensor, "batch width"]:
    """The places of the columns that stay, in order; rows that keep fewer than `width` begin with -1."""
    order = keep.int().argsort(dim=-1, stable=True)[:, keep.shape[1] - width :]
    return torch.where(keep.gather(1, order), order, -1)


def gather_columns(layer: Any, local: Int[Tensor, "batch width"]) -> None:
    """Leaves, of one layer's keys and values, the columns at these places; -1 stands for any."""
    places = local.clamp(min=0)[:, None, :, None]
    for name in ("keys", "values"):
        tensor = getattr(layer, name)
        setattr(layer, name, tensor.gather(2, places.expand(-1, tensor.shape[1], -1, tensor.shape[3])))
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = local.shape[1]


def drop_column(layer: Any, place: int) -> None:
    """Takes one column out of one layer's keys and values; what stands behind it moves, and nothing else is copied."""
    for name in ("keys", "values"):
        tensor = getattr(layer, name)
        if tensor.requires_grad:
            setattr(layer, name, torch.cat([tensor[:, :, :place], tensor[:, :, place + 1 :]], dim=2))
            continue
        tensor[:, :, place:-1] = tensor[:, :, place + 1 :].clone()
        setattr(layer, name, tensor[:, :, :-1])
