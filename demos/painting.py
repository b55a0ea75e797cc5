"""One picture drawn token after token, twice: by the model alone, and with drafts of a small one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

import mmaccel
from demos.moments import Halted
from diffusion.autoregressive.origins import SHOWN, coloured
from diffusion.autoregressive.painters import ContinuousPainter
from diffusion.pictures import CAPTION, sheet
from mmaccel.reports import figure

SIDE = 256  # pixels of a drawing
LEGEND = "\n".join(
    f'- <span style="color:{colour}" aria-hidden="true">■</span> {words}' for words, colour in SHOWN.values()
)
FIGURES = {
    "acceptance": "drafts accepted, share",
    "tokens_a_round": "tokens a round",
    "target_backbone_calls": "passes of the large model",
    "target_head_calls": "head calls of the large model",
    "seconds": "seconds",
}


@dataclass(frozen=True)
class Painted:
    """What is known so far.  figures: name, by the model alone, with drafts.  progress: in words."""

    plain: Image.Image | None = None
    speculative: Image.Image | None = None
    origins: Image.Image | None = None
    figures: tuple[tuple[str, str, str], ...] = ()
    progress: str = ""


def paint_twice(
    painter: ContinuousPainter,
    label: int,
    length: int,
    guidance: float,
    seed: int,
    stop: Event,
    show: Callable[[Painted], None],
) -> None:
    """Draws with the model alone and then with drafts; both follow the same distribution, with draws of their own."""
    model, method = painter.model, dataclasses.replace(painter.speculation, length=length)
    painter.label(str(label))  # says which classes there are
    state = Painted()

    def passed(count: int) -> None:
        nonlocal state
        state = dataclasses.replace(state, progress=f"{count} passes of the large model")
        show(state)

    def drawn() -> Tensor:
        with counted(model, stop, passed):
            return painter.shown(painter.draw([label], seed, guidance=guidance))

    try:
        began = time.perf_counter()
        plain = drawn()
        seconds = time.perf_counter() - began
        state = dataclasses.replace(state, plain=as_picture(plain))
        show(state)
        with mmaccel.applied(model, method) as run:
            speculative, report = drawn(), run.report
    except Halted:
        show(dataclasses.replace(state, progress="stopped before the end"))
        return
    dense = {"seconds": seconds, **{name: report.quantities[name].dense for name in FIGURES if "calls" in name}}
    rows = []
    for name, words in FIGURES.items():
        plain_value: Any = dense.get(name, "")
        rows.append((words, figure(plain_value) if plain_value != "" else "", figure(report[name])))
    show(
        dataclasses.replace(
            state,
            speculative=as_picture(speculative),
            origins=as_picture(coloured(report.details["origins"], speculative)),
            figures=tuple(rows),
            progress="",
        )
    )


@contextmanager
def counted(model: Any, stop: Event, passed: Callable[[int], None]) -> Iterator[None]:
    """Tells of every pass of the model's backbone.  Raises Halted at the first after `stop` is set."""
    count = 0

    def before(*_: Any) -> None:
        nonlocal count
        count += 1
        if stop.is_set():
            raise Halted
        if count % 8 == 1:
            passed(count)

    parts = list(model.backbone.children())
    layers = next(part for part in parts if isinstance(part, torch.nn.ModuleList))
    handle = layers[0].register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def as_picture(pixels: Float[Tensor, "1 3 height width"]) -> Image.Image:
    """A picture as the page shows it."""
    shown = sheet(pixels, [""])
    return shown.crop((0, CAPTION, *shown.size)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
