"""The mechanism of the output gate: how tokens that were just written do not stay in a running model's cache.

A step of one token behind a cache runs as it is; afterwards the layers from the gate on give back the keys and values
of the rows that were not let in.  Tokens keep their positions, `vision_tokens.kept_columns` remembers what each layer
holds, and `vision_tokens.layer_columns` gives each layer the mask that it then needs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmaccel.methods import Unsupported
from vision_tokens.attention_rows import settle
from vision_tokens.cache_room import gather_columns, held_places, packed
from vision_tokens.cutting import Cutter
from vision_tokens.families import Host
from vision_tokens.freezing import Freezer
from vision_tokens.inside import InsideMechanism
from vision_tokens.kept_columns import (
    KeptColumns,
    cache_bytes,
    held_length,
    layer_columns,
    remember_layers,
    remember_rows,
    rows_of,
    window_length,
)
from vision_tokens.layer_columns import LayerColumns, Run, current_run
from vision_tokens.layer_cutting import LayerCutter
from vision_tokens.output_gate import novelty
from vision_tokens.prompts import refuse_other_caches, refuse_other_kernel

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from vision_tokens.output_gate import OutputGate


@dataclass(frozen=True)
class Answer:
    """What a cache remembers of the answer: what its tokens were worth, who was let in, and the sum of those.

    known: the hidden states of those that were let in, summed.
    """

    worth: Float[Tensor, "batch said"]
    admitted: Bool[Tensor, "batch said"]
    known: Float[Tensor, "batch width"]

    @classmethod
    def unsaid(cls, batch: int, width: int, device: torch.device) -> Answer:
        """Of an answer that has not begun."""
        nothing = torch.zeros(batch, 0, device=device)
        return cls(nothing, nothing.bool(), torch.zeros(batch, width, device=device))

    def mapped(self, rows: Callable[[Tensor], Tensor]) -> Answer:
        """The same of other rows."""
        return Answer(rows(self.worth), rows(self.admitted), rows(self.known))

    def said(
        self, states: Float[Tensor, "batch width"], worth: Float[Tensor, " batch"], admitted: Bool[Tensor, " batch"]
    ) -> Answer:
        """With one more token."""
        known = self.known + states.float() * admitted[:, None]
        return Answer(
            torch.cat([self.worth, worth[:, None]], dim=1),
            torch.cat([self.admitted, admitted[:, None]], dim=1),
            known,
        )


@dataclass
class Step:
    """One forward of the language model.  before, answer: what was said without its token, and with it once judged."""

    run: Run
    started: float
    before: Answer
    answer: Answer | None = None


_step: ContextVar[Step | None] = ContextVar("step", default=None)


class Gatekeeper(InsideMechanism):
    """The output gate's hooks on one model.  Holds facts about the model only."""

    def __init__(self, method: OutputGate, host: Host, attachment: Attachment) -> None:
        super().__init__(method, host, attachment)
        self.method, self.layers = method, host.decoder_layers
        self.states = int(host.text.config.hidden_size)  # type: ignore[union-attr, arg-type]
        if method.layer >= len(self.layers):
            raise Unsupported(
                f"output-gate judges what layer {method.layer} reads, and this decoder has the layers "
                f"0..{len(self.layers) - 1}; set layer to one of them"
            )
        self._refuse_windows()
        self.predictor = method.predictor(self.states)

    def _refuse_windows(self) -> None:
        from transformers import DynamicCache

        first = self.method.layer
        layers = DynamicCache(config=self.host.text.config).layers
        if all(window_length(layer) < sys.maxsize for layer in layers[first:]):
            raise Unsupported(
                f"all layers of this model from {first} on have a window, which bounds what they cache, and "
                "output-gate leaves those alone: it would do nothing here"
            )

    def attach(self, target: nn.Module) -> None:
        """Registers every hook.  Raises `Unsupported` for models whose caches cannot be cut."""
        self.take_place(Cutter, LayerCutter, Freezer)
        if LayerColumns.of(self.host, self.attachment).packed:
            raise Unsupported(
                "positions='packed' numbers the tokens that a layer holds, and output-gate takes some of them away; "
                "use positions='kept' with the method that drops tokens between layers"
            )
        self.attachment.pre_hook(self.layers[self.method.layer], self.judge)
        self.attach_to_text()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Looks up what the cache remembers of the answer."""
        _step.set(None)
        if (run := current_run()) is None:
            return
        settle(run.device)
        kwargs = {**dict(zip(self.text_names, args, strict=False)), **kwargs}
        refuse_other_kernel(self.method, self.host, self.kernel)
        refuse_other_caches(self.method, kwargs)
        before = None if kwargs.get("past_key_values") is None else rows_of(kwargs["past_key_values"])
        if not isinstance(before, Answer):
            before = Answer.unsaid(run.batch, self.states, run.device)
        _step.set(Step(run, time.perf_counter(), before))

    def judge(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decides about the token of a step that reads no prompt."""
        step = _step.get()
        if step is None or step.run.held == 0 or step.run.new > 1:
            return
        states: Tensor = (args[0] if args else kwargs["hidden_states"])[:, 0]
        with torch.no_grad():
            if self.predictor is None:
                worth = novelty(states, step.before.known.to(states.device))
            else:
                keep, drop = self.predictor.to(states.device, states.dtype)(states).float().unbind(dim=-1)
                worth = keep - drop
            worth = worth.to(step.before.worth.device)
            if bool(worth.isnan().any()):
                raise ValueError(
                    "the language model's hidden states hold NaN, so output-gate cannot judge tokens; look for "
                    "overflow if the model runs in float16 (bfloat16 has the range)"
                )
            admitted = self.method.admits(worth, step.before.worth)
            step.answer = step.before.said(states.to(worth.device), worth, admitted)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Gives back what was not let in, and keeps account of it."""
        step = _step.get()
        _step.set(None)
        if step is None or output is None:
            return
        cache, report = output.past_key_values, self.attachment.current_report()
        if step.answer is not None:
            give_back(cache, self.method.layer, step.answer.admitted[:, -1])
        answer = step.answer or step.before
        remember_rows(cache, answer)
        if report is None:
            return
        settle(step.run.device)
        if self.leads:
            self.keep_time(report, step.answer is None, step.started)
            if step.answer is None:
                self.record_whole_prompt(report, step.run)
        report.record("kv_bytes", *cache_bytes(cache), "B")
        report.record("cached_answer", int(answer.admitted.sum()), answer.admitted.numel(), "tokens")


def give_back(cache: Any, first: int, admitted: Bool[Tensor, " batch"]) -> None:
    """Takes the last token of the rows that were not let in out of the layers from `first` on; not out of windows."""
    numbers = [
        number for number in range(first, len(cache.layers)) if window_length(cache.layers[number]) == sys.maxsize
    ]
    if bool(admitted.all()):
        return
    seen, before = held_length(cache), layer_columns(cache)
    after, found = dict(before), dict[tuple[int, int], tuple[KeptColumns, Tensor]]()
    for number in numbers:  # layers that hold the same go on sharing what is known of it
        layer = cache.layers[number]
        shared = id(before.get(number)), layer.keys.shape[2]
        if shared not in found:
            found[shared] = _without_last(held_places(cache, number, seen), seen, admitted.to(layer.keys.device))
        after[number], local = found[shared]
        if bool(admitted.any()):
            gather_columns(layer, local)
        else:
            layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
    remember_layers(cache, after)


def _without_last(index: Tensor, seen: int, admitted: Bool[Tensor, " batch"]) -> tuple[KeptColumns, Tensor]:
    """The columns with the last one gone where it was not let in, and where they come from; -1 is padding."""
    if not bool(admitted.any()):
        return KeptColumns(index[:, :-1], seen, bool((index[:, :-1] < 0).any())), index
    index = torch.cat([index[:, :-1], index[:, -1:].where(admitted[:, None], -1)], dim=1)
    local = packed(index >= 0, int((index >= 0).sum(dim=-1).max()))
    index = torch.where(local >= 0, index.gather(1, local.clamp(min=0)), -1)
    return KeptColumns(index, seen, bool((index < 0).any())), local
