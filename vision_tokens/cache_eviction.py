"""The cache mechanism: how tokens leave the keys and values of a running language model.

When a prompt was read, each layer's keys and values are gathered at the tokens that a method keeps; in every later
step, room is made for the new one.  Tokens keep their positions, `vision_tokens.kept_columns` remembers what each layer
holds, and `vision_tokens.layer_columns` gives each layer the mask that it then needs.
"""

from __future__ import annotations

import functools
import time
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from mmaccel.methods import Unsupported
from mmaccel.reports import Report
from vision_tokens.attention_rows import Recorded, listen, recording, settle
from vision_tokens.cache_room import Room, Scored, make_room, prune
from vision_tokens.cutting import Cutter
from vision_tokens.families import Host
from vision_tokens.freezing import Freezer, resting_rows
from vision_tokens.inside import InsideMechanism
from vision_tokens.kept_columns import (
    cache_bytes,
    rows_of,
)
from vision_tokens.layer_columns import LayerColumns, Run, current_run
from vision_tokens.layer_cutting import LayerCutter
from vision_tokens.layer_view import LayerView, sees_the_future
from vision_tokens.looking_ahead import attention_of
from vision_tokens.prefill_cost import scoring_flops
from vision_tokens.prompts import (
    padding_of,
    refuse_chunks,
    refuse_other_caches,
    refuse_other_kernel,
    visual_places,
)

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from vision_tokens.cache_methods import CacheMethod


@dataclass
class Step:
    """One forward of the language model.  reads: whether it reads a prompt.  real: None without padding."""

    run: Run
    started: float
    reads: bool
    real: Bool[Tensor, "batch new"] | None = None
    undo: ExitStack = field(default_factory=ExitStack)
    scores: Recorded = field(default_factory=Recorded)  # by attention module
    reals: dict[int, Bool[Tensor, "batch tokens"] | None] = field(default_factory=dict)  # by layer, as `real`
    views: dict[int, LayerView] = field(default_factory=dict)  # by layer, what was scored, without the values


_step: ContextVar[Step | None] = ContextVar("step", default=None)


class Evictor(InsideMechanism):
    """A cache method's hooks on one model.  Holds facts about the model only."""

    def __init__(self, method: CacheMethod, host: Host, attachment: Attachment) -> None:
        super().__init__(method, host, attachment)
        self.method = method
        layers, profile = host.decoder_layers, method.profile
        if profile is not None and len(profile) != len(layers):
            raise Unsupported(
                f"{method.name}'s profile is for {len(profile)} layers, and this decoder has {len(layers)}; make one "
                "for this model"
            )
        keeps = [method.kept_share] * len(layers) if profile is None else profile
        self.read_in = {number: attention_of(layers[number]) for number, kept in enumerate(keeps) if kept < 1}

    def attach(self, target: nn.Module) -> None:
        """Registers every hook.  Raises `Unsupported` for models whose caches cannot be cut."""
        method, host, attachment = self.method, self.host, self.attachment
        self.take_place(Cutter, LayerCutter, Freezer)
        columns = LayerColumns.of(host, attachment)
        if columns.packed:
            raise Unsupported(
                f"positions='packed' numbers the tokens that a layer holds, and {method.name} takes some of them away; "
                "use positions='kept' with the method that drops tokens between layers"
            )
        if host.family.grouped_positions and method.positions != "kept":
            raise Unsupported(f"{method.name}: positions of several axes (M-RoPE) cannot drift; use positions='kept'")
        if self.read_in:
            listen(attachment, list(self.read_in.values()))
            refuse_chunks(target, attachment, method)
        self.attach_to_text()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Has the layers' attention scored while a prompt is read."""
        _step.set(None)
        if (run := current_run()) is None:
            return None
        settle(run.device)
        step = Step(run, time.perf_counter(), reads=run.held == 0 or run.new > 1)
        _step.set(step)
        if not self.read_in:
            return None
        kwargs = {**dict(zip(self.text_names, args, strict=False)), **kwargs}
        refuse_other_kernel(self.method, self.host, self.kernel)
        refuse_other_caches(self.method, kwargs)
        if step.reads:
            step.real = padding_of(kwargs.get("attention_mask"), run.new)
            readers = {module: functools.partial(self._score, number) for number, module in self.read_in.items()}
            step.scores = step.undo.enter_context(recording(readers))
        room = None if kwargs.get("past_key_values") is None else rows_of(kwargs["past_key_values"])
        if self.method.positions == "drifting" and isinstance(room, Room):
            kwargs["position_ids"] = room.held[:, :1].to(run.device) + torch.arange(run.new, device=run.device)
        return (), kwargs

    def _score(self, number: int, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
        step, visual = _step.get(), visual_places()
        assert step is not None
        real, places = step.real, step.run.places()
        if step.run.index is not None:
            real = places >= 0 if step.run.padded else None
        seen = torch.zeros_like(places, dtype=torch.bool) if visual is None else visual.gather(1, places.clamp(min=0))
        shown = torch.ones_like(seen) if real is None else real
        causal = not sees_the_future(mask, query.shape[2])
        asking = shown & ~resting_rows(number, places)
        view = LayerView(query, key, scaling, mask, seen & shown, asking, causal=causal)
        step.views[number], step.reals[number] = view.without_values(), real
        return self.method.score(view)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Evicts what the prompt, or a step, leaves no room for, and keeps account of it in the report."""
        step = _step.get()
        _step.set(None)
        if step is None:
            return
        step.undo.close()
        if output is None:
            return
        settle(step.run.device)
        read, cache, report = time.perf_counter(), output.past_key_values, self.attachment.current_report()
        if report is not None and self.leads:
            self.keep_time(report, step.reads, step.started)
        if step.reads and self.read_in:
            shares = self._prune(step, cache)
            if report is not None:
                report.details["evicted_shares"] = shares
        elif self.read_in:
            make_room(cache)
        if report is None:
            return
        settle(step.run.device)
        if step.reads:
            report.seconds["ranking"] = report.seconds.get("ranking", 0.0) + step.scores.seconds
            report.seconds["evict"] = time.perf_counter() - read
            self._record(report, step, cache)

    def _prune(self, step: Step, cache: Any) -> list[list[float]]:
        scored = {}
        for number, module in self.read_in.items():
            scores = step.scores[module][-1]
            if bool(scores.isnan().any()):
                raise ValueError(
                    f"the language model's attention holds NaN, so {self.method.name} cannot rank tokens; look for "
                    "overflow if the model runs in float16 (bfloat16 has the range)"
                )
            scored[number] = Scored(scores, step.reals[number])
        run, real = step.run, step.real
        tokens = [run.new] * run.batch if real is None else real.sum(dim=-1).tolist()
        return prune(cache, self.method, scored, tokens, run.new)

    def _record(self, report: Report, step: Step, cache: Any) -> None:
        if self.leads:
            self.record_whole_prompt(report, step.run)
        if cache is not None:
            report.record("kv_bytes", *cache_bytes(cache), "B")
        before, method, views = report.quantities.get("selection_flops"), self.method, step.views
        report.record(
            "selection_flops",
            lambda: scoring_flops(method, views) + (0 if before is None else before.read()[0]),
            0,
            "FLOP",
        )
        room = None if cache is None else rows_of(cache)
        if isinstance(room, Room):
            report.facts["kv_tokens"] = room.held.tolist()
