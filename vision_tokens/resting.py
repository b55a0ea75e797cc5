"""A decoder layer that runs on some tokens of a prompt, and only makes keys and values of those that rest.

The layer's own attention module makes the keys and values; the cache that the layer then updates puts them among the
others, in the order of the sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mmaccel.methods import Unsupported
from mmaccel.scoped import within
from vision_tokens.gathering import gather, rows_to_gather
from vision_tokens.layer_columns import taken
from vision_tokens.looking_ahead import attention_of


@dataclass(frozen=True)
class Split:
    """Which tokens of a prompt work, and which rest.

    text, rest: their places; rows with fewer begin with -1.  order: for every token, where it is in the text followed
    by the rest.
    """

    text: Int[Tensor, "batch working"]
    rest: Int[Tensor, "batch resting"]
    order: Int[Tensor, "batch tokens"]

    @classmethod
    def of(cls, resting: Bool[Tensor, "batch tokens"]) -> Split:
        """The split at these marks."""
        text, rest = rows_to_gather(~resting, None), rows_to_gather(resting, None)
        both, tokens = torch.cat([text, rest], dim=-1), resting.shape[1]
        order = torch.zeros(len(both), tokens + 1, dtype=torch.long, device=both.device)
        places = torch.arange(both.shape[1], device=both.device).expand(len(both), -1)
        return cls(text, rest, order.scatter(1, both.where(both >= 0, tokens), places)[:, :tokens])

    def empty(self) -> Split:
        """The same shapes on the meta device."""
        return Split(*(torch.empty_like(places, device="meta") for places in (self.text, self.rest, self.order)))

    def joined(self, text: Tensor, rest: Tensor, dimension: int) -> Tensor:
        """The rows of all tokens, from those of the text and of the rest."""
        both = torch.cat([text, rest], dim=dimension)
        shape = [len(self.order), *[1] * (both.dim() - 1)]
        shape[dimension] = self.order.shape[1]
        whole = list(both.shape)
        whole[dimension] = self.order.shape[1]
        return both.gather(dimension, self.order.view(shape).expand(whole))


class _Made(Exception):
    """Ends an attention module's forward as soon as its keys and values are made."""


class Maker:
    """In place of a cache: takes the keys and values that an attention module makes, and ends its forward there."""

    def __init__(self) -> None:
        self.made: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Takes them."""
        self.made = keys, values
        raise _Made


class Joining:
    """A cache that puts keys and values of the tokens at rest among those that a layer makes of the text."""

    def __init__(self, cache: Any, split: Split, made: tuple[Tensor, Tensor]) -> None:
        self.cache, self.split, self.made = cache, split, made

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """All keys and values of the layer, with those of earlier turns before them."""
        both = (self.split.joined(new, rest, 2) for new, rest in zip((keys, values), self.made, strict=True))
        return tuple(both) if self.cache is None else self.cache.update(*both, layer_idx, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


Rest = Literal["works", "makes keys", "skips attention"]
"""What an attention module does for the tokens that it gets: all; keys and values, where its layer then ends; or keys
and values, and nothing for the layer to go on with."""


_rest: ContextVar[Rest] = ContextVar("rest", default="works")


def quiet_attention(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """An attention module's forward, that adds nothing to tokens at rest once their keys and values are made."""
    if _rest.get() != "skips attention":
        return forward(*args, **kwargs)
    with suppress(_Made):
        forward(*args, **kwargs)
    return torch.zeros_like(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]), None


def no_queries(forward: Callable[..., Any], width: int, hidden: Tensor) -> Any:
    """A query projection's forward, that computes nothing for tokens at rest."""
    return forward(hidden) if _rest.get() == "works" else hidden.new_zeros(1).expand(*hidden.shape[:-1], width)


def quieten(layer: nn.Module, set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Changes the forwards inside a layer for tokens at rest."""
    attention = attention_of(layer)
    set_attribute(attention, "forward", functools.partial(quiet_attention, attention.forward))
    queries = getattr(attention, "q_proj", None)  # a projection that makes all three makes queries for nothing
    if queries is not None:
        set_attribute(queries, "forward", functools.partial(no_queries, queries.forward, queries.out_features))


def split_layer(
    layer: nn.Module, ffn: bool, split: Split, past: int, hidden: Tensor, kwargs: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any], Tensor]:
    """What a frozen layer is to run on: the text's hidden states and arguments; and what becomes of the rest's.

    past: columns that the layer sees of earlier turns.
    """
    maker, rest = Maker(), gather(hidden, split.rest)
    given = {**kwargs, **_rotary(kwargs, split.rest), "attention_mask": None, "past_key_values": maker}
    with within(_rest, "skips attention" if ffn else "makes keys"), suppress(_Made):
        rest = hidden_of(layer.forward(rest, **given))
    if maker.made is None:
        raise Unsupported(
            "gradient checkpointing takes a layer's cache away, through which shortv hands it visual tokens' keys; "
            "call model.gradient_checkpointing_disable() or mmaccel.remove(model)"
        )
    mask = rows_of_mask(kwargs.get("attention_mask"), split.text, past, hidden.shape[1])
    cache = Joining(kwargs.get("past_key_values"), split, maker.made)
    given = {**kwargs, **_rotary(kwargs, split.text), "attention_mask": mask, "past_key_values": cache}
    return gather(hidden, split.text), given, rest


def _rotary(kwargs: Mapping[str, Any], places: Tensor) -> dict[str, Any]:
    found = (("position_ids", -1), ("position_embeddings", -2))
    return {name: taken(kwargs.get(name), places, dimension) for name, dimension in found}


def hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def rows_of_mask(mask: Tensor | None, places: Int[Tensor, "batch rows"], past: int, tokens: int) -> Tensor:
    """The rows of a mask, [batch, heads or 1, tokens, keys], at these places; None is the causal one."""
    places = places.clamp(min=0)
    if mask is None:
        return (torch.arange(past + tokens, device=places.device) <= places[..., None] + past)[:, None]
    mask = mask.expand(len(places), *mask.shape[1:])
    return mask.gather(2, places[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))


def all_rows(split: Split, query: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """A frozen layer's queries and mask with rows for the tokens at rest, which ask for nothing."""
    assert mask is not None  # a frozen layer always has one
    resting = split.rest.shape[1]
    query = split.joined(query, query.new_zeros(1).expand(*query.shape[:2], resting, query.shape[3]), 2)
    rows = mask.expand(len(query), *mask.shape[1:])
    open_ = torch.full((1,), mask.dtype == torch.bool, dtype=mask.dtype, device=mask.device)
    return query, split.joined(rows, open_.expand(*rows.shape[:2], resting, rows.shape[3]), 2)


def freeze_twin(splits: Mapping[int, Split], ffn: bool, number: int, layer: nn.Module) -> None:
    """Freezes tokens in a layer of a twin whose operations are counted."""
    if (split := splits.get(number)) is None:
        return
    quieten(layer, setattr)
    rest: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        text, kwargs, left = split_layer(module, ffn, split, 0, args[0], kwargs)
        rest.append(left)
        return (text,), kwargs

    def after(module: nn.Module, args: Any, output: Any) -> Tensor:
        return split.joined(hidden_of(output), rest.pop(), 1)

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after)
