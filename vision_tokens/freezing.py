"""The freezing mechanism: how visual tokens stop to query in some decoder layers.

A frozen layer runs on the text alone.  Before it, the layer's own attention module makes keys and values of the tokens
that rest; the cache that the layer then updates puts them among the text's, in the order of the sequence.  No forward
is written again: norms, rotary tables, adapters and quantised projections are the model's.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mmaccel.methods import Unsupported
from mmaccel.reports import Report
from vision_tokens.attention_rows import asking_rows, settle
from vision_tokens.cutting import Cutter, gather, rows_to_gather
from vision_tokens.families import Host
from vision_tokens.inside import InsideMechanism
from vision_tokens.kept_columns import cache_bytes
from vision_tokens.layer_columns import LayerColumns, Run, current_run, taken
from vision_tokens.layer_cutting import LayerCutter
from vision_tokens.looking_ahead import attention_of
from vision_tokens.prefill_cost import prefill_flops
from vision_tokens.prompts import padding_of, refuse_flash, refuse_other_kernel, refuse_static, visual_places

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from vision_tokens.shortv import ShortV


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


@contextmanager
def _at_rest(rest: Rest) -> Iterator[None]:
    token = _rest.set(rest)
    try:
        yield
    finally:
        _rest.reset(token)


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
    with _at_rest("skips attention" if ffn else "makes keys"), suppress(_Made):
        rest = _hidden_of(layer.forward(rest, **given))
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


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def rows_of_mask(mask: Tensor | None, places: Int[Tensor, "batch rows"], past: int, tokens: int) -> Tensor:
    """The rows of a mask, [batch, heads or 1, tokens, keys], at these places; None is the causal one."""
    places = places.clamp(min=0)
    if mask is None:
        return (torch.arange(past + tokens, device=places.device) <= places[..., None] + past)[:, None]
    mask = mask.expand(len(places), *mask.shape[1:])
    return mask.gather(2, places[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))


@dataclass
class Freezing:
    """One forward that reads a prompt with images.

    resting: the tokens of the prompt that rest in frozen layers; None without any.  splits: by frozen layer.
    rest: what becomes of the hidden states of those at rest in the layer that is running.
    """

    run: Run
    resting: Bool[Tensor, "batch new"] | None
    started: float
    report: Report | None
    splits: dict[int, Split] = field(default_factory=dict)
    rest: Tensor | None = None

    def split(self, number: int) -> Split:
        """The split of the tokens that are still there."""
        assert self.resting is not None
        places = self.run.places()
        still = self.resting.gather(1, places.clamp(min=0)) | (places < 0)
        self.splits[number] = self.run.once(("split",), lambda: Split.of(still))
        return self.splits[number]


_freezing: ContextVar[Freezing | None] = ContextVar("freezing", default=None)


def resting_rows(number: int, places: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """Which of a prompt's tokens at these places ask for nothing in a layer of the forward that is running."""
    state = _freezing.get()
    if state is None or state.resting is None or number not in state.splits:
        return torch.zeros_like(places, dtype=torch.bool)
    return state.resting.gather(1, places.clamp(min=0))


class Freezer(InsideMechanism):
    """The method's hooks on one model.  Holds facts about the model only."""

    def __init__(self, method: ShortV, host: Host, attachment: Attachment) -> None:
        super().__init__(method, host, attachment)
        self.method = method
        self.layers = host.decoder_layers
        self.frozen = method.frozen(len(self.layers))

    def attach(self) -> None:
        """Registers every hook.  Raises `Unsupported` for flash attention."""
        host, attachment = self.host, self.attachment
        refuse_flash(self.method, self.kernel)
        self.take_place(Cutter, LayerCutter)
        LayerColumns.of(host, attachment)
        self.attach_to_text()
        for number in self.frozen:
            quieten(self.layers[number], attachment.set_attribute)
            attachment.pre_hook(self.layers[number], functools.partial(self.before, number))
            attachment.hook(self.layers[number], functools.partial(self.after, number))

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Says which tokens of a prompt rest."""
        _freezing.set(None)
        run, visual = current_run(), visual_places()
        if run is None:
            return
        settle(run.device)
        state = Freezing(run, None, time.perf_counter(), self.attachment.current_report())
        _freezing.set(state)
        if self.frozen and visual is not None and bool(visual.any()):
            kwargs = {**dict(zip(self.text_names, args, strict=False)), **kwargs}
            refuse_static(self.method, kwargs.get("past_key_values"))
            refuse_other_kernel(self.method, self.host, self.kernel)
            real = padding_of(kwargs.get("attention_mask"), run.new)
            state.resting = visual if real is None else visual | ~real

    def before(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hands a frozen layer the text alone."""
        state = _freezing.get()
        if state is None or state.resting is None:
            return None
        split, cache = state.split(number), kwargs.get("past_key_values")
        past = cache.layers[number].keys.shape[2] if cache is not None and _has(cache, number) else 0
        text, kwargs, state.rest = split_layer(layer, self.method.ffn, split, past, args[0], kwargs)
        asking_rows.set(functools.partial(all_rows, split))
        return (text,), kwargs

    def after(self, number: int, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Puts the tokens at rest back among the text."""
        asking_rows.set(None)
        state = _freezing.get()
        if state is None or state.rest is None or output is None:
            return None
        hidden, state.rest = state.splits[number].joined(_hidden_of(output), state.rest, 1), None
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    # Figures

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Ends the forward, and keeps account of it in the report."""
        state = _freezing.get()
        _freezing.set(None)
        if state is None or output is None or (report := state.report) is None:
            return
        settle(state.run.device)
        reads = visual_places() is not None or state.run.held == 0
        if self.leads:
            phase = "prefill" if reads else "decode"
            seconds = 0.0 if reads else report.seconds.get(phase, 0.0)
            report.seconds[phase] = seconds + time.perf_counter() - state.started
        if reads:
            self._record(report, state, output)

    def _record(self, report: Report, state: Freezing, output: Any) -> None:
        run, layers, visual = state.run, len(self.layers), visual_places()
        count = 0 if visual is None else int(visual.sum())
        if (cache := getattr(output, "past_key_values", None)) is not None:
            report.record("kv_bytes", *cache_bytes(cache), "B")
        widths = [run.width(layer) for layer in range(layers)]
        found, ffn, text = (
            {number: split.empty() for number, split in state.splits.items()},
            self.method.ffn,
            self.host.text,
        )
        dense = report.quantities.get("prefill_flops")
        report.record(
            "prefill_flops",
            lambda: prefill_flops(text, run.batch, run.new, widths, functools.partial(freeze_twin, found, ffn)),
            (lambda: prefill_flops(text, run.batch, run.new)) if dense is None else dense.dense,
            "FLOP",
        )
        before = report.quantities.get("visual_tokens")
        if before is None or self.leads:
            working = count * (layers - len(found)) / layers
            report.record("visual_tokens", working, count, "tokens, mean over layers")
        report.facts["frozen_layers"] = sorted(found)


def _has(cache: Any, number: int) -> bool:
    return number < len(cache.layers) and cache.layers[number].is_initialized


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
        return split.joined(_hidden_of(output), rest.pop(), 1)

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after)
