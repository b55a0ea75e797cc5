"""The language-input mechanism: how chosen visual tokens are cut out of a running transformers model.

Vision-language models compute visual features, scatter them over placeholder tokens and call their language model with
embeddings, positions and a mask.  `vision_tokens.encoding` decides what stays of each image; here a hook on the
multimodal model finds the placeholders, and a hook on its language model gathers embeddings, positions and masks, in
the prefill and, with what the cache remembers, in every later step.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mmaccel.budgets import keeps_all
from mmaccel.methods import Unsupported
from mmaccel.reports import Report
from vision_tokens.attention_rows import settle
from vision_tokens.encoding import Encoded, Encoder, is_running_dense
from vision_tokens.families import Host
from vision_tokens.families.facts import PIXELS
from vision_tokens.gathering import gather, mask_for, rows_to_gather, spread_over
from vision_tokens.kept_columns import (
    KeptColumns,
    cache_bytes,
    held_length,
    kept_columns,
    masking_original,
    remember,
)
from vision_tokens.layout import Layout
from vision_tokens.masks import finish, gather_finished, is_finished, window_of
from vision_tokens.prefill_cost import prefill_flops
from vision_tokens.prompts import (
    keep_visual_places,
    placeholders_in,
    refuse_places,
    refuse_second,
    refuse_static,
    set_visual_places,
)
from vision_tokens.question_reading import answered

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from vision_tokens.language_input import LanguageInputMethod


@dataclass
class Call:
    """One forward of the multimodal model that reads images."""

    report: Report
    keep: Bool[Tensor, "batch new"]


@dataclass
class Step:
    """One forward of the language model behind a cut: what its cache holds afterwards."""

    started: float
    report: Report | None = None
    columns: KeptColumns | None = None
    lengths: tuple[int, int] = (0, 0)  # held and original length of what went in


_call: ContextVar[Call | None] = ContextVar("call", default=None)
_step: ContextVar[Step | None] = ContextVar("step", default=None)


class Cutter:
    """A method's hooks on one model.  Holds facts about the model only: what belongs to a call lives in its context."""

    def __init__(self, method: LanguageInputMethod, host: Host, attachment: Attachment) -> None:
        self.method, self.host, self.attachment = method, host, attachment
        self.encoders = {kind: Encoder(method, host, kind) for kind in host.tokens}
        self.forward_names = list(inspect.signature(host.multimodal.forward).parameters)
        self.text_names = list(inspect.signature(host.text.forward).parameters)
        self.window = window_of(host.text.config)

    def attach(self, target: nn.Module) -> None:
        """Registers every hook, through the attachment.  Raises `Unsupported` if another decoration is there."""
        host, attachment = self.host, self.attachment
        refuse_second(host, Cutter)
        for encoder in self.encoders.values():
            encoder.attach(attachment)
        attachment.pre_hook(target, self.refuse_places)
        attachment.pre_hook(host.multimodal, self.begin)
        attachment.hook(host.multimodal, self.end)
        attachment.pre_hook(host.text, self.cut)
        attachment.hook(host.text, self.account)

    # The multimodal model: where the placeholders are

    def refuse_places(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Arguments that speak of places in the whole prompt would meet the logits of the kept tokens."""
        if keeps_all(self.method.budget) or is_running_dense():
            return
        refuse_places(self.method, kwargs)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Encodes images and videos that came as pixels, and marks which tokens of the prompt stay."""
        _call.set(None)
        set_visual_places(None)
        masking_original.set(False)
        if is_running_dense():
            return None
        kwargs = {**dict(zip(self.forward_names, args, strict=False)), **kwargs}
        encoded = self._encoded(kwargs)
        masking_original.set(True)
        cache = kwargs.get("past_key_values")
        if not encoded:
            if cache is None or cache.get_seq_length() == 0:
                self._new_report({})
            return (), kwargs
        report = self._new_report(encoded)
        places = {kind: placeholders_in(self.host, kwargs, kind) for kind in encoded}
        visual = torch.stack(list(places.values())).any(dim=0)
        keep = ~visual
        for kind, found in encoded.items():
            keep |= spread_over(places[kind], found)
        set_visual_places(visual)
        _call.set(Call(report, keep))
        if cache is not None and kept_columns(cache) is None and cache.get_seq_length() and not bool(keep.all()):
            remember(cache, KeptColumns.all_kept(len(keep), keep.device))
        return (), kwargs

    def _encoded(self, kwargs: dict[str, Any]) -> dict[str, Encoded]:
        """By kind of input, what was decided about it; pixels are encoded here, and leave the arguments."""
        outputs = {} if kwargs.get("mm_encoder_outputs") is None else kwargs["mm_encoder_outputs"]
        outputs = {"image": outputs} if isinstance(outputs, Tensor) else dict(outputs)  # a tensor is the old spelling
        for kind, pixels in PIXELS.items():
            if kwargs.get(pixels) is not None and kind in self.encoders:
                outputs[kind] = self.encoders[kind].encode_from(kwargs)
                kwargs[pixels] = None
            elif kwargs.get(pixels) is not None:
                raise Unsupported(f"{self.method.name}: {kind} input of this family is not supported")
        outputs = {kind: output for kind, output in outputs.items() if output is not None}
        if outputs:
            kwargs["mm_encoder_outputs"] = outputs
        for kind, output in outputs.items():
            found, waits = getattr(output, "mmaccel", None), kind in self.encoders and self.encoders[kind].holding
            if not isinstance(found, Encoded) or bool(found.held) != bool(waits):
                raise Unsupported(
                    "these visual features were computed without the method: encode the images after mmaccel.apply, "
                    "and leave generate's prefill_chunk_size unset (a chunk holds part of an image only)"
                )
            if found.held:
                outputs[kind] = answered(self.host, output, kwargs)
        return {kind: output.mmaccel for kind, output in outputs.items()}

    def end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forgets the call, also when it raised."""
        _call.set(None)
        set_visual_places(None)
        masking_original.set(False)

    def _new_report(self, encoded: Mapping[str, Encoded]) -> Report:
        report = self.attachment.start_report()
        layouts: dict[str, list[Layout]] = {kind: found.layouts for kind, found in encoded.items()}
        report.record("images", len(layouts.get("image", [])))
        if videos := layouts.get("video"):
            report.record("videos", len(videos))
            report.record("frames", sum(video.partitions for video in videos))
        if encoded:
            report.seconds["encode"] = sum(found.seconds for found in encoded.values())
            report.seconds["selection"] = sum(found.selection for found in encoded.values())
            report.details["cells"] = [cells for found in encoded.values() for cells in found.cells]
            report.details["layouts"] = [layout for found in encoded.values() for layout in found.layouts]
            for found in encoded.values():
                report.seconds.update(found.phases)
        for kind, found in encoded.items():
            prefix = "" if kind == "image" else f"{kind}_"
            report.quantities.update({prefix + name: quantity for name, quantity in found.figures.items()})
        return report

    # The language model: cut what comes in, and keep account in its cache

    def cut(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gathers embeddings, positions and masks of the tokens that stay."""
        _step.set(None)
        masking_original.set(False)
        if is_running_dense():
            return None
        kwargs = {**dict(zip(self.text_names, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        call, columns = _call.get(), kept_columns(cache)
        embeddings: Tensor = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        batch, new = embeddings.shape[:2]
        if call is not None:
            settle(embeddings.device)
        step = Step(time.perf_counter(), call.report if call else None, columns, (new, new))
        _step.set(step)
        if columns is None and (call is None or bool(call.keep.all())):
            return (), kwargs
        mask = kwargs.get("attention_mask")
        past_window = self.window is not None and (cache.get_seq_length() if cache else 0) + new > self.window
        if call is None and mask is None and columns is not None and not past_window and self._needs_nothing(columns):
            return (), kwargs
        self._refuse_what_cannot_be_cut(cache, mask)
        past = columns.extended(held_length(cache)) if columns else self._past_columns(cache, batch, embeddings.device)
        seen = columns.seen + past.shape[1] - columns.index.shape[1] if columns else past.shape[1]
        masks = mask if is_finished(mask) else None
        mask = None if mask is None or masks is not None else mask.bool().to(embeddings.device)
        if past_window and masks is None:
            masks = finish(self.host.text.config, embeddings, mask, cache)
        positions = self._positions(kwargs.get("position_ids"), seen, batch, new, embeddings.device)
        if self.method.positions == "packed":
            real = seen if mask is None else mask[:, :seen].sum(dim=-1, keepdim=True)
            positions = positions - (real - (past >= 0).sum(dim=-1, keepdim=True))
        if call is not None:
            index = rows_to_gather(call.keep, None if mask is None else mask[:, -new:])
            positions = self._gather_positions(positions, index)
            kwargs["inputs_embeds"] = gather(embeddings, index)
            self._cut_deepstack(kwargs, call.keep, index)
            keep_visual_places(index)
            held = torch.where(index >= 0, index + seen, -1)
            past_and_held = torch.cat([past, held], dim=-1)
            step.columns = KeptColumns(past_and_held, seen + new, padded=bool((past_and_held < 0).any()))
        else:
            index = torch.arange(new, device=past.device).expand(batch, -1)
            held = index + seen
        step.lengths = (held.shape[1], new)
        kwargs["position_ids"] = positions
        columns_now = torch.cat([past, held], dim=-1)
        kwargs["attention_mask"] = (
            mask_for(columns_now, mask, cache is not None)
            if masks is None
            else gather_finished(masks, self.host.text.config, cache, index, columns_now)
        )
        return (), kwargs

    def _needs_nothing(self, columns: KeptColumns) -> bool:
        """Without padding and with positions kept, later steps are right as they come: the cache says what was seen."""
        return not columns.padded and self.method.positions == "kept"

    def _refuse_what_cannot_be_cut(self, cache: Any, mask: Any) -> None:
        refuse_static(self.method, cache)
        if mask is not None and not is_finished(mask) and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise Unsupported(
                f"{self.method.name} takes attention masks of shape [batch, tokens] or [batch, heads, tokens, tokens]; "
                f"got {f'{mask.dim()} dimensions' if isinstance(mask, Tensor) else type(mask).__name__}"
            )

    @staticmethod
    def _cut_deepstack(
        kwargs: dict[str, Any], keep: Bool[Tensor, "batch new"], index: Int[Tensor, "batch held"]
    ) -> None:
        """Visual features that deeper layers add to their tokens stay with the tokens that stay."""
        visual = kwargs.get("visual_pos_masks")
        if visual is not None:
            kept = keep[visual]
            kwargs["visual_pos_masks"] = visual.gather(1, index.clamp(min=0)) & (index >= 0)
            kwargs["deepstack_visual_embeds"] = [features[kept] for features in kwargs["deepstack_visual_embeds"]]

    @staticmethod
    def _past_columns(cache: Any, batch: int, device: torch.device) -> Int[Tensor, "batch held"]:
        held = 0 if cache is None else held_length(cache)
        return torch.arange(held, device=device).expand(batch, -1)

    def _positions(self, given: Tensor | None, seen: int, batch: int, new: int, device: torch.device) -> Tensor:
        if given is None:
            given = torch.arange(seen, seen + new, device=device)[None]
        return given.expand(*given.shape[:-2], batch, new)

    def _gather_positions(self, positions: Tensor, index: Int[Tensor, "batch held"]) -> Tensor:
        if self.method.positions == "packed":
            first = positions.min(dim=-1, keepdim=True).values
            return first + (index >= 0).cumsum(dim=-1).sub(1).clamp(min=0)
        return positions.gather(-1, index.clamp(min=0).expand(*positions.shape[:-1], -1))

    def account(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """After the language model ran: what its cache holds, and the figures of the report."""
        step = _step.get()
        _step.set(None)
        if step is None or output is None:
            return
        cache = getattr(output, "past_key_values", None)
        if step.columns is not None and cache is not None and step.columns is not kept_columns(cache):
            remember(cache, step.columns)
        if step.report is not None:
            settle(output.last_hidden_state.device)
        seconds = time.perf_counter() - step.started
        if step.report is None:
            if (report := self.attachment.current_report()) is not None:
                report.seconds["decode"] = report.seconds.get("decode", 0.0) + seconds
            return
        step.report.seconds["prefill"] = seconds
        self._record(step.report, step, len(output.last_hidden_state), cache)

    def _record(self, report: Report, step: Step, batch: int, cache: Any) -> None:
        held, original = step.lengths
        layouts, cells = report.details["layouts"], report.details["cells"]
        report.record(
            "visual_tokens",
            lambda: sum(int(layout.tokens_of(mask).sum()) for layout, mask in zip(layouts, cells, strict=True)),
            sum(len(layout.source) for layout in layouts),
            "tokens",
        )
        report.record("prompt_tokens", held, original, "tokens a row")
        text = self.host.text
        report.record(
            "prefill_flops",
            lambda: prefill_flops(text, batch, held),
            lambda: prefill_flops(text, batch, original),
            "FLOP",
        )
        if cache is not None:
            report.record("kv_bytes", *cache_bytes(cache), "B")
        if step.columns is not None:
            report.details["prompt_columns"] = step.columns
