"""Decoder layers that hold different columns: each gets rotary tables and a mask of its own.

A transformers decoder makes its masks and rotary tables once, for all layers.  Behind a cut between layers, or an
eviction from a layer's cache, they fit no longer: here a hook before every layer takes that layer's rows and columns
out of them.  So masks of any kind (padding, sliding windows, images that see themselves) hold on the original places.
Within a forward the state is a `Run`; what outlives it belongs to the cache (`vision_tokens.kept_columns`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mmaccel.methods import Unsupported
from vision_tokens.encoding import is_running_dense
from vision_tokens.families import Host
from vision_tokens.kept_columns import KeptColumns, held_length, layer_columns, remember_layers, window_length
from vision_tokens.masks import gathered, window_of

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment

_HANDLED = ("hidden_states", "attention_mask", "position_ids", "position_embeddings")


@dataclass
class Run:
    """One forward of the language model: what its layers hold, and which of its tokens are still there.

    held: columns that the language model was handed before.  new: tokens of this forward.  past: by layer, what it
    holds of the former.  shown: the two-dimensional mask of all columns, if one was given.  behind_window: whether the
    sequence is longer than some layer looks back.  index: places, among the
    new tokens, of those that are still there; -1 is padding, None says all.  version: how often it changed.
    layers: what each layer behind a cut holds.  cuts: by layer, what happens to the hidden states before it.
    """

    batch: int
    held: int
    new: int
    device: torch.device
    past: Mapping[int, KeptColumns]
    shown: Bool[Tensor, "batch seen"] | None = None
    behind_window: bool = False
    index: Int[Tensor, "batch width"] | None = None
    padded: bool = False
    version: int = 0
    layers: dict[int, KeptColumns] = field(default_factory=dict)
    cuts: dict[int, Callable[[int, Tensor, dict[str, Any]], Tensor]] = field(default_factory=dict)
    memo: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def narrow(self, local: Int[Tensor, "batch width"]) -> None:
        """Goes on with the tokens at these places among those still there; -1 is padding."""
        index = local if self.index is None else self.index.gather(1, local.clamp(min=0))
        self.index = torch.where(local >= 0, index, -1)
        self.padded = bool((self.index < 0).any())
        self.version += 1

    def places(self) -> Int[Tensor, "batch width"]:
        """The places, among the new tokens, of those that are still there; -1 is padding."""
        everything = torch.arange(self.new, device=self.device).expand(self.batch, -1)
        return everything if self.index is None else self.index

    def width(self, layer: int) -> int:
        """How many of the new tokens the layer works on."""
        if (columns := self.layers.get(layer)) is None:
            return self.new
        return columns.index.shape[1] - self.held + (self.past[layer].dropped if layer in self.past else 0)

    def columns(self, layer: int) -> KeptColumns:
        """All that the layer holds after this forward."""
        past = self.past.get(layer)

        def make() -> KeptColumns:
            before = KeptColumns(torch.empty(self.batch, 0, dtype=torch.long, device=self.device), 0, False)
            before = past or before
            places = self.places()
            rows = torch.where(places >= 0, places + self.held, -1)
            columns = torch.cat([before.extended(self.held - before.dropped), rows], dim=-1)
            return KeptColumns(columns, self.held + self.new, before.padded or self.padded)

        found: KeptColumns = self.once(("columns", id(past)), make)
        return found

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` gives, made once between two cuts for a key: neighbouring layers share what they hold."""
        key = (*key, self.version)
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


_run: ContextVar[Run | None] = ContextVar("run", default=None)


def current_run() -> Run | None:
    """The forward of a language model with hooks on its layers that this thread is in."""
    return _run.get()


class LayerColumns:
    """The hooks on one language model and its layers; methods of one attachment share them (`LayerColumns.of`)."""

    def __init__(self, host: Host) -> None:
        self.host, self.packed = host, False
        self.flash = "flash" in (host.text.config._attn_implementation or "")  # type: ignore[union-attr, operator]
        self.window = window_of(host.text.config)
        self.text_names = list(inspect.signature(host.text.forward).parameters)
        self.layer_names = [list(inspect.signature(layer.forward).parameters) for layer in host.decoder_layers]

    @classmethod
    def of(cls, host: Host, attachment: Attachment) -> LayerColumns:
        """The attachment's hooks on this language model, registered when they are first asked for."""
        if (cls, host.text) not in attachment.shared:
            columns = attachment.shared[cls, host.text] = cls(host)
            attachment.pre_hook(host.text, columns.enter)
            attachment.hook(host.text, columns.leave)
            for number, layer in enumerate(host.decoder_layers):
                attachment.pre_hook(layer, functools.partial(columns.before_layer, number))
        found: LayerColumns = attachment.shared[cls, host.text]
        return found

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Starts the account of a forward."""
        _run.set(None)
        if is_running_dense():
            return
        kwargs = {**dict(zip(self.text_names, args, strict=False)), **kwargs}
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        tokens: Tensor = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        batch, new = tokens.shape[:2]
        shown = mask.bool().to(tokens.device) if isinstance(mask, Tensor) and mask.dim() == 2 else None
        held, seen = (0, 0) if cache is None else (held_length(cache), cache.get_seq_length())
        behind = self.window is not None and seen + new > self.window
        _run.set(Run(batch, held, new, tokens.device, layer_columns(cache), shown, behind))

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Stores on the cache what each layer holds by now."""
        run = _run.get()
        _run.set(None)
        cache = getattr(output, "past_key_values", None)
        if run is None or not run.layers or cache is None:
            return
        remember_layers(cache, {**run.past, **run.layers})

    def before_layer(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Cuts before the layer, if it is time to, and hands it its own rows and columns."""
        run = _run.get()
        if run is None:
            return None
        kwargs = {**dict(zip(self.layer_names[number], args, strict=False)), **kwargs}
        hidden = kwargs.pop("hidden_states")
        if (cut := run.cuts.get(number)) is not None:
            hidden = cut(number, hidden, kwargs)
        if run.index is not None:
            run.layers[number] = run.columns(number)
        return (hidden,), self.adjusted(run, number, kwargs)

    def adjusted(self, run: Run, number: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A layer's arguments, cut to the tokens that are still there and the columns that it holds."""
        past, index = run.past.get(number), run.index
        if past is None and index is None:
            return kwargs
        if run.behind_window and self.flash:
            raise Unsupported(
                f"some layers of this model look back {self.window} tokens, and the sequence is longer: once tokens "
                "are dropped, they need a mask entry for every pair of tokens, which flash attention does not take; "
                "load the model with attn_implementation='sdpa'"
            )
        given = {name: id(kwargs.get(name)) for name in _HANDLED}
        mask, changed = kwargs.get("attention_mask"), {}
        if mask is not None or run.padded or (past is not None and past.padded):
            shown = run.columns(number).index.shape[1] - self._out_of_sight(run, number, kwargs.get("past_key_values"))
            changed["attention_mask"] = run.once(
                ("mask", given["attention_mask"], id(past), shown),
                lambda: cut_mask(mask, run.places(), run.columns(number), shown, self.flash),
            )
        if index is not None:
            for name, dimension in (("position_ids", -1), ("position_embeddings", -2)):
                cut = functools.partial(taken, kwargs.get(name), index, dimension)
                changed[name] = run.once((name, given[name]), cut)
            self._refuse_other_tensors(run, kwargs)
        if self.packed:
            changed |= run.once(
                ("packed", given["position_ids"], id(past)), lambda: self._repacked(run, number, kwargs)
            )
        return {**kwargs, **changed}

    @staticmethod
    def _out_of_sight(run: Run, number: int, cache: Any) -> int:
        """How many of its columns a layer with a window has let go of."""
        if cache is None or number >= len(cache.layers):
            return 0
        held = run.held - (run.past[number].dropped if number in run.past else 0)
        return max(0, held - window_length(cache.layers[number]))

    @staticmethod
    def _refuse_other_tensors(run: Run, kwargs: Mapping[str, Any]) -> None:
        for name, value in kwargs.items():
            if name not in _HANDLED and isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == run.new:
                raise Unsupported(
                    f"this model hands its layers {name!r}, a tensor of {list(value.shape)} with a place for every "
                    "token, which is not known how to cut; tokens cannot be dropped between its layers"
                )

    def _repacked(self, run: Run, number: int, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Positions that count the tokens the layer holds, and rotary tables for them."""
        given = kwargs["position_ids"].expand(run.batch, -1)
        past, index = run.past.get(number), run.index
        positions = given
        if index is not None:
            positions = given.min(dim=-1, keepdim=True).values + (index >= 0).cumsum(dim=-1).sub(1).clamp(min=0)
        if past is not None:
            real = past.seen if run.shown is None else run.shown[:, : past.seen].sum(dim=-1, keepdim=True)
            positions = positions - (real - (past.index >= 0).sum(dim=-1, keepdim=True))
        tables = self.host.text.rotary_emb(  # type: ignore[operator]
            torch.empty(0, dtype=next(self.host.text.parameters()).dtype, device=run.device), positions
        )
        return {"position_ids": positions, "position_embeddings": tables}


def cut_mask(
    mask: Tensor | None, rows: Int[Tensor, "batch width"], columns: KeptColumns, shown: int, flash: bool
) -> Tensor | None:
    """The rows and columns of a mask that a layer needs; padding columns are hidden.

    mask: [batch, heads or 1, new, seen], boolean or to be added; [batch, seen]; or None, the plain causal mask, which
    stays None where the layer has no padding.  Of a layer with a window it may lack the first columns, which are out
    of sight.  rows: places of the queries among the new tokens.  shown: how many columns the layer still has.
    """
    if mask is None and not columns.padded:
        return None
    index = columns.index
    if flash:
        real = index[:, -shown:] >= 0
        return real if mask is None else mask.gather(-1, index[:, -shown:].clamp(min=0)) * real
    if mask is not None:
        lacking = columns.seen - mask.shape[-1]
        index = torch.where(index >= lacking, index - lacking, -1)
    return gathered(mask, rows, index, shown)


def taken(value: Any, index: Int[Tensor, "batch width"], dimension: int) -> Any:
    """The places at `index` along a dimension counted from the end, whose neighbour to the left is the batch (or 1).

    value: a tensor, or tuples of tensors; anything else is handed back.
    """
    if isinstance(value, tuple | list):
        return type(value)(taken(part, index, dimension) for part in value)
    if not isinstance(value, Tensor):
        return value
    shape = list(value.shape)
    shape[dimension - 1] = len(index)
    places = index.clamp(min=0).view(len(index), -1, *[1] * (-dimension - 1))
    return value.expand(shape).gather(
        dimension, places.expand(*shape[:dimension], -1, *shape[len(shape) + dimension + 1 :])
    )
