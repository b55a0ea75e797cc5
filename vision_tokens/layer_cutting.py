"""The decoder mechanism: how visual tokens leave a running language model between two of its layers.

When a prompt with images is read, the attention of the layers that a method asked for is shown to it, and the tokens
that it does not keep are taken out of the hidden states before the next layer: the work of every later layer shrinks.
`vision_tokens.layer_columns` sees to it that each layer gets its own rotary tables and masks, then and ever after.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mmaccel.methods import Unsupported
from mmaccel.reports import Report
from vision_tokens.attention_rows import Recorded, listen, recording, settle
from vision_tokens.cutting import Cutter
from vision_tokens.encoding import is_running_dense
from vision_tokens.families import Host
from vision_tokens.gathering import gather, rows_to_gather
from vision_tokens.inside import InsideMechanism
from vision_tokens.kept_columns import cache_bytes
from vision_tokens.layer_columns import LayerColumns, Run, current_run
from vision_tokens.layer_view import LayerView, sees_the_future
from vision_tokens.looking_ahead import attention_of, look_ahead
from vision_tokens.prefill_cost import prediction_flops, prefill_flops, selection_flops
from vision_tokens.prompts import (
    padding_of,
    refuse_chunks,
    refuse_other_kernel,
    refuse_places,
    refuse_static,
    visual_places,
)

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from vision_tokens.decoder_layers import DecoderMethod
    from vision_tokens.predictors import ImagePredictor


@dataclass
class Cutting:
    """One forward that reads a prompt with images: what a method knows of the tokens that are still there.

    counts: visual tokens of each row, before the first cut.  real: None without padding.
    """

    run: Run
    undo: ExitStack
    visual: Bool[Tensor, "batch tokens"]
    real: Bool[Tensor, "batch tokens"] | None
    marks: Bool[Tensor, "batch tokens"] | None
    counts: list[int]
    scores: Recorded = field(default_factory=Recorded)  # by attention module
    seconds: float = 0.0  # spent on scores
    kept: dict[int, int] = field(default_factory=dict)  # by cut, visual tokens of all rows
    widths: dict[int, int] = field(default_factory=dict)  # by cut, tokens a row
    views: dict[int, LayerView] = field(default_factory=dict)  # by cut, what was scored, without the values
    predicted: list[torch.Size] = field(default_factory=list)  # shapes of the hidden states that a predictor read

    def narrow(self, local: Int[Tensor, "batch width"]) -> None:
        """Goes on with the tokens at these places; -1 is padding."""
        self.run.narrow(local)
        there = local >= 0
        self.visual = self.visual.gather(1, local.clamp(min=0)) & there
        self.real = there if self.run.padded else None
        if self.marks is not None:
            self.marks = self.marks.gather(1, local.clamp(min=0)) & there


@dataclass
class Timing:
    """When the language model began, and the report of the call that reads a prompt."""

    started: float
    report: Report | None


_cutting: ContextVar[Cutting | None] = ContextVar("cutting", default=None)
_timing: ContextVar[Timing | None] = ContextVar("timing", default=None)


class LayerCutter(InsideMechanism):
    """A decoder method's hooks on one model.  Holds facts about the model only."""

    def __init__(self, method: DecoderMethod, host: Host, attachment: Attachment) -> None:
        super().__init__(method, host, attachment)
        self.method = method
        self.layers = host.decoder_layers
        self.cuts = list(method.cuts(len(self.layers)))
        self.looks_ahead = method.scored_in == "the layer itself"
        self.predictor = method.predictor(int(host.text.config.hidden_size)) if self.cuts else None  # type: ignore[union-attr, arg-type]
        read = () if self.predictor else self.cuts
        self.read_in = {cut: attention_of(self.layers[cut if self.looks_ahead else cut - 1]) for cut in read}

    def attach(self, target: nn.Module) -> None:
        """Registers every hook.  Raises `Unsupported` for kernels and models whose layers cannot be cut."""
        host, attachment = self.host, self.attachment
        if host.family.grouped_positions and self.method.positions == "packed":
            raise Unsupported(
                f"{self.method.name}: positions of several axes (M-RoPE) cannot be packed; use positions='kept'"
            )
        self.take_place(Cutter)
        columns = self.columns = LayerColumns.of(host, attachment)
        columns.packed = self.method.positions == "packed"
        listen(attachment, list(self.read_in.values()))
        attachment.pre_hook(target, self.refuse_places)
        if self.cuts:
            refuse_chunks(target, attachment, self.method)
        self.attach_to_text()

    def refuse_places(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Arguments that speak of places in the whole prompt would meet the logits of the kept tokens."""
        if self.cuts and not is_running_dense():
            refuse_places(self.method, kwargs)

    # The language model

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Prepares the cuts of a forward that reads visual tokens."""
        _cutting.set(None)
        _timing.set(None)
        run, visual = current_run(), visual_places()
        if run is None:
            return
        report = self._started(run, visual)
        settle(run.device)
        _timing.set(Timing(time.perf_counter(), report))
        if visual is None or not self.cuts or not any(counts := visual.sum(dim=-1).tolist()):
            return
        kwargs = {**dict(zip(self.text_names, args, strict=False)), **kwargs}
        self._refuse_what_changed(kwargs)
        real = padding_of(kwargs.get("attention_mask"), run.new)
        marks = self.method.mark(kwargs["inputs_embeds"], visual, torch.ones_like(visual) if real is None else real)
        state = Cutting(run, ExitStack(), visual, real, marks, counts)
        cuts = self.cuts_that_bite(set(counts))
        if self.predictor is None and not self.looks_ahead:
            readers = {self.read_in[cut]: self._scorer(cut) for cut in cuts}
            state.scores = state.undo.enter_context(recording(readers))
        _cutting.set(state)
        run.cuts = dict.fromkeys(cuts, self.cut)

    def cuts_that_bite(self, counts: set[int]) -> list[int]:
        """The cuts at which a row of so many visual tokens loses some; others need no scores."""
        kept = [[visual, *self.method.kept(len(self.layers), visual)] for visual in counts if visual]
        return [cut for stage, cut in enumerate(self.cuts) if any(row[stage + 1] < row[stage] for row in kept)]

    def _refuse_what_changed(self, kwargs: dict[str, Any]) -> None:
        refuse_static(self.method, kwargs.get("past_key_values"))
        refuse_other_kernel(self.method, self.host, self.kernel)
        deep = kwargs.get("deepstack_visual_embeds")
        if deep is not None and min(self.cuts) <= len(deep) - 1:
            raise Unsupported(
                f"this model adds visual features to the hidden states behind its layers 0..{len(deep) - 1}, so tokens "
                f"can be dropped from layer {len(deep)} on; {self.method.name} drops before layer {min(self.cuts)}"
            )

    def _scorer(self, cut: int) -> Callable[..., Tensor]:
        def score(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
            state = _cutting.get()
            assert state is not None
            real = torch.ones_like(state.visual) if state.real is None else state.real
            marked = None if state.marks is None else rows_to_gather(state.marks, None)
            causal = not sees_the_future(mask, query.shape[2])
            view = LayerView(query, key, scaling, mask, state.visual, real, marked, causal)
            state.views[cut] = view.without_values()
            settle(query.device)
            start = time.perf_counter()
            scores = self.method.score(view)
            settle(query.device)
            state.seconds += time.perf_counter() - start
            return scores

        return score

    def cut(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The hidden states of the tokens that stay from this layer on."""
        state = _cutting.get()
        assert state is not None
        scores = self._scores(state, number, hidden, kwargs)
        if bool(scores[state.visual].isnan().any()):
            found = "attention holds" if self.predictor is None else "hidden states hold"
            raise ValueError(
                f"the language model's {found} NaN, so {self.method.name} cannot rank tokens; look for "
                "overflow if the model runs in float16 (bfloat16 has the range)"
            )
        stage = self.cuts.index(number)
        counts = [int(self.method.kept(len(self.layers), visual)[stage]) for visual in state.counts]
        hidden, keep = self.choose(hidden, scores, state.visual, counts)
        state.kept[number] = int((keep & state.visual).sum())
        if bool(keep.all()):
            return hidden
        local = rows_to_gather(keep, state.real)
        state.narrow(local)
        state.widths[number] = local.shape[1]
        return gather(hidden, local)

    def _scores(self, state: Cutting, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What each token is worth, [batch, tokens]; read at visual tokens alone."""
        if self.predictor is not None:
            return self._predicted(self.predictor, state, hidden)
        module = self.read_in[number]
        if not self.looks_ahead:
            return state.scores[module].pop()
        kwargs = self.columns.adjusted(state.run, number, kwargs)
        return look_ahead(self.layers[number], module, self._scorer(number), hidden, kwargs)

    @staticmethod
    def _predicted(predictor: ImagePredictor, state: Cutting, hidden: Tensor) -> Tensor:
        """The log-probability that the predictor gives each visual token to be kept."""
        settle(hidden.device)
        start = time.perf_counter()
        with torch.no_grad():
            places = rows_to_gather(state.visual, None)
            real, states = places >= 0, gather(hidden, places)
            logits = predictor.to(hidden.device, hidden.dtype)(states, None if bool(real.all()) else real)
            scores = torch.zeros(hidden.shape[:2], device=hidden.device)
            scores[state.visual] = logits.float().log_softmax(dim=-1)[..., 0][real]
        settle(hidden.device)
        state.seconds += time.perf_counter() - start
        state.predicted.append(states.shape)
        return scores

    def choose(
        self, hidden: Tensor, scores: Tensor, visual: Bool[Tensor, "batch tokens"], counts: list[int]
    ) -> tuple[Tensor, Bool[Tensor, "batch tokens"]]:
        """The method's choice; a mechanism that remembers more than this prompt puts its own in place."""
        return self.method.choose(hidden, scores, visual, counts)

    # Figures

    def _started(self, run: Run, visual: Tensor | None) -> Report | None:
        """The report of a call that reads visual tokens, with what the dense model would do."""
        report, text = self.attachment.current_report(), self.host.text
        if report is None or (visual is None and not (self.leads and run.held == 0)):
            return None
        if "visual_tokens" not in report.quantities:
            read = 0 if visual is None else int(visual.sum())
            report.record("visual_tokens", read, read, "tokens, mean over layers")
        if visual is None:
            return None
        if "prefill_flops" not in report.quantities:
            dense = functools.cache(lambda: prefill_flops(text, run.batch, run.new))
            report.record("prefill_flops", dense, dense, "FLOP")
        return report

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Ends the forward's cuts, and keeps account of it in the report."""
        state, timing = _cutting.get(), _timing.get()
        _cutting.set(None)
        _timing.set(None)
        if state is not None:
            state.undo.close()
        if timing is None or output is None:
            return
        if self.leads:
            self._time(timing, output)
        if timing.report is not None:
            self._record(timing.report, state, output)

    def _time(self, timing: Timing, output: Any) -> None:
        settle(output.last_hidden_state.device)
        report = timing.report or self.attachment.current_report()
        if report is not None:
            self.keep_time(report, timing.report is not None, timing.started)

    def _record(self, report: Report, state: Cutting | None, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            report.record("kv_bytes", *cache_bytes(cache), "B")
        if state is None:
            return
        run, layers = state.run, len(self.layers)
        held = per_layer(sum(state.counts), state.kept, layers)
        whole = report.quantities["visual_tokens"].dense
        report.record("visual_tokens", sum(held) / layers, whole, "tokens, mean over layers")
        report.facts["cuts"] = [{"layer": cut, "visual_tokens": kept} for cut, kept in state.kept.items()]
        report.details["layer_columns"] = dict(run.layers)
        widths = per_layer(run.new, state.widths, layers)
        text, dense = self.host.text, report.quantities["prefill_flops"].dense
        report.record("prefill_flops", lambda: prefill_flops(text, run.batch, run.new, widths), dense, "FLOP")
        report.seconds["ranking"] = report.seconds.get("ranking", 0.0) + state.seconds
        method, views, predictor, shapes = self.method, state.views, self.predictor, state.predicted
        ranking = functools.partial(selection_flops, text, method, views)
        if predictor is not None:
            ranking = functools.partial(prediction_flops, predictor, shapes)
        report.record("selection_flops", ranking, 0, "FLOP")


def per_layer(tokens: int, kept: dict[int, int], layers: int) -> list[int]:
    """The tokens that each layer works on, from what stays at each cut."""
    held = []
    for layer in range(layers):
        tokens = kept.get(layer, tokens)
        held.append(tokens)
    return held
