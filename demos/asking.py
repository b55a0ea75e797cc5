"""One question about one picture, asked twice: of the model as it is, and of the decorated one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

import mmaccel
from mmaccel.methods import Method
from mmaccel.reports import Report, figure
from vision_tokens import UniformTokens
from vision_tokens.answering import Clock, decorated, prepare
from vision_tokens.layout import Layout
from vision_tokens.overlay import draw_layouts, encoder_pictures

FIGURES = {"visual_tokens": "visual tokens", "prefill_flops": "prefill FLOPs", "kv_bytes": "KV cache, bytes"}
FIRST, RATE = "first token, ms", "tokens a second"


@dataclass(frozen=True)
class Asked:
    """What is known so far: two answers, two drawings, and by figure what it is for the model and decorated."""

    answers: tuple[str, str] = ("", "")
    drawings: tuple[Image.Image | None, Image.Image | None] = (None, None)
    figures: Mapping[str, tuple[float | None, float | None]] = dataclasses.field(default_factory=dict)

    def table(self) -> list[list[str]]:
        """The figures as people read them: name, dense, decorated, ratio."""
        return [
            [name, *("…" if one is None else figure(one) for one in pair), _ratio(*pair)]
            for name, pair in self.figures.items()
        ]


def ask_twice(
    model: Any,
    processor: Any,
    picture: Image.Image,
    question: str,
    methods: Sequence[Method],
    longest: int,
    stop: Event,
    show: Callable[[Asked], None],
) -> None:
    """Shows what is known whenever there is more: drawings and counts first, then both answers as they are said.

    Each side reads the prompt once before its time is taken, one after the other, while nothing else of this run works.
    """
    inputs = prepare(processor, picture, question)
    asked = Asked()
    with mmaccel.applied(model, UniformTokens(budget=1.0)) as run:  # the dense model, which says where its tokens lie
        _generate(model, inputs, max_new_tokens=1)
        layouts = run.report.details["layouts"]
    with decorated(model, methods):
        _generate(model, inputs, max_new_tokens=1)
        report = mmaccel.report(model)
    seen = encoder_pictures(
        processor.image_processor, inputs["pixel_values"], picture, sum(layout.partitions for layout in layouts)
    )
    places = inputs["input_ids"][0] == model.config.image_token_id
    kept = kept_cells(report, layouts, places)
    drawings = (draw_layouts(layouts, [layout.valid() for layout in layouts], seen), draw_layouts(layouts, kept, seen))
    figures = {words: report.quantities[name].read()[::-1] for name, words in FIGURES.items()}
    asked = dataclasses.replace(asked, drawings=drawings, figures={**figures, FIRST: (None, None), RATE: (None, None)})
    show(asked)
    for side, chosen in enumerate(((), methods)):
        if stop.is_set():
            return

        def heard(text: str, first: float, rate: float | None, side: int = side) -> None:
            nonlocal asked
            figures = {**asked.figures, FIRST: _put(asked.figures[FIRST], side, first * 1e3)}
            figures[RATE] = _put(asked.figures[RATE], side, rate)
            asked = dataclasses.replace(asked, answers=_put(asked.answers, side, text), figures=figures)
            show(asked)

        with decorated(model, chosen):
            streamer = Heard(processor, heard)
            _generate(model, inputs, max_new_tokens=longest, streamer=streamer, stopping_criteria=[_Stopping(stop)])


class Heard(Clock):
    """A streamer that tells of every token: the text so far, seconds to the first token, tokens a second since."""

    def __init__(self, processor: Any, tell: Callable[[str, float, float | None], None]) -> None:
        super().__init__()
        self.processor, self.tell = processor, tell
        self.tokens: list[int] = []
        self.began = time.perf_counter()

    def put(self, value: Tensor) -> None:
        before = len(self.times)
        super().put(value)
        if len(self.times) == before:
            return
        self.tokens += value.flatten().tolist()
        first, last = self.times[0], self.times[-1]
        rate = before / (last - first) if before else None
        self.tell(self.processor.decode(self.tokens, skip_special_tokens=True).strip(), first - self.began, rate)


class _Stopping:
    """Ends generation at the next token."""

    def __init__(self, stop: Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Bool[Tensor, "batch"]:
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)


def kept_cells(
    report: Report, layouts: Sequence[Layout], places: Bool[Tensor, "prompt"]
) -> list[Bool[Tensor, "partitions cells"]]:
    """The cells whose tokens the language model's last layer still reads.

    Methods that cut before the language model say so themselves; of those that cut inside it, the last layer's columns
    are taken.  places: which tokens of the prompt are visual.
    """
    if "cells" in report.details:
        return list(report.details["cells"])
    left = torch.ones(int(places.sum()), dtype=torch.bool)
    if layers := report.details.get("layer_columns"):
        reads = torch.zeros(len(places), dtype=torch.bool)
        index = layers[max(layers)].index[0].cpu()
        reads[index[index >= 0]] = True
        left = reads[places.cpu()]
    found = []
    for layout in layouts:
        mine, left = left[: len(layout.source)], left[len(layout.source) :]
        cells = torch.zeros(layout.partitions * layout.cells, dtype=torch.bool)
        sources = layout.source.cpu()[mine]
        cells[sources[sources >= 0]] = True
        found.append(cells.view(layout.partitions, layout.cells))
    return found


def _generate(model: Any, inputs: Any, **settings: Any) -> None:
    with torch.no_grad():
        model.generate(**inputs, do_sample=False, **settings)


def _put(pair: tuple[Any, Any], side: int, value: Any) -> tuple[Any, Any]:
    return (pair[0], value) if side else (value, pair[1])


def _ratio(dense: float | None, other: float | None) -> str:
    return "" if not dense or other is None else f"{other / dense:.2f}\N{NO-BREAK SPACE}x"
