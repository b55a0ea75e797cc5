"""The freezing mechanism: how visual tokens stop to query in some decoder layers.

A frozen layer runs on the text alone, as `vision_tokens.resting` has it.  No forward is written again: norms, rotary
tables, adapters and quantised projections are the model's.
"""

from __future__ import annotations

import functools
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mmaccel.reports import Report
from vision_tokens.attention_rows import asking_rows, settle
from vision_tokens.cutting import Cutter
from vision_tokens.families import Host
from vision_tokens.inside import InsideMechanism
from vision_tokens.kept_columns import cache_bytes
from vision_tokens.layer_columns import LayerColumns, Run, current_run
from vision_tokens.layer_cutting import LayerCutter
from vision_tokens.prefill_cost import prefill_flops
from vision_tokens.prompts import padding_of, refuse_flash, refuse_other_kernel, refuse_static, visual_places
from vision_tokens.resting import Split, all_rows, freeze_twin, hidden_of, quieten, split_layer

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from vision_tokens.shortv import ShortV


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
        hidden, state.rest = state.splits[number].joined(hidden_of(output), state.rest, 1), None
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
            self.keep_time(report, reads, state.started)
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
