"""What every mechanism inside the language model does at its door: find a prompt's visual tokens, start its report."""

from __future__ import annotations

import functools
import inspect
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import nn

from mmaccel.methods import Method
from mmaccel.reports import Report
from vision_tokens.encoding import is_running_dense
from vision_tokens.families import Host
from vision_tokens.layer_columns import Run
from vision_tokens.prefill_cost import prefill_flops
from vision_tokens.prompts import (
    hooked_by,
    kernel_of,
    note_visual_places,
    refuse_second,
    set_visual_places,
    visual_places,
)

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment


class InsideMechanism(ABC):
    """Base of the hooks that a method inside the language model has on it.  Holds facts about the model only.

    leads: whether no mechanism in front of this one finds the visual tokens and starts the report.
    """

    leads: bool

    def __init__(self, method: Method, host: Host, attachment: Attachment) -> None:
        self.host, self.attachment = host, attachment
        self.kernel = kernel_of(method, host)
        self.text_names = list(inspect.signature(host.text.forward).parameters)
        self.forward_names = list(inspect.signature(host.multimodal.forward).parameters)

    def take_place(self, *before: type) -> None:
        """Says who stands in front.  Raises `Unsupported` if a mechanism of this kind hangs on the model already."""
        refuse_second(self.host, type(self))
        self.leads = not hooked_by(self.host, *before)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds the visual tokens of a prompt and starts the report of its call, unless one in front has done so."""
        if not self.leads or is_running_dense():
            return
        kwargs = {**dict(zip(self.forward_names, args, strict=False)), **kwargs}
        images, cache = note_visual_places(self.host, kwargs), kwargs.get("past_key_values")
        if images or cache is None or cache.get_seq_length() == 0:
            self.attachment.start_report()

    def end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forgets the call, also when it raised."""
        if self.leads:
            set_visual_places(None)

    def attach_to_text(self) -> None:
        """Registers the hooks on the multimodal model, and `enter` and `leave` on its language model."""
        self.attachment.pre_hook(self.host.multimodal, self.begin)
        self.attachment.hook(self.host.multimodal, self.end)
        self.attachment.pre_hook(self.host.text, self.enter)
        self.attachment.hook(self.host.text, self.leave)

    def keep_time(self, report: Report, reads: bool, started: float) -> None:
        """Adds what passed since a forward began to the report's prefill if it read a prompt, else to its decoding."""
        phase = "prefill" if reads else "decode"
        before = 0.0 if reads else report.seconds.get(phase, 0.0)
        report.seconds[phase] = before + time.perf_counter() - started

    def record_whole_prompt(self, report: Report, run: Run) -> None:
        """Keeps account of a prompt that every layer works on as a whole."""
        visual, text = visual_places(), self.host.text
        count = 0 if visual is None else int(visual.sum())
        report.record("visual_tokens", count, count, "tokens")
        report.record("prompt_tokens", run.new, run.new, "tokens a row")
        flops = functools.cache(lambda: prefill_flops(text, run.batch, run.new))
        report.record("prefill_flops", flops, flops, "FLOP")

    @abstractmethod
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a forward of the language model."""

    @abstractmethod
    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """After it."""
