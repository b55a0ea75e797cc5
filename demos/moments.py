"""One search for moments of a video, watched: what is looked at, what was found, and the score over time."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from PIL import Image

from mmaccel.named import resolve
from video.detectors import Detections, Detector
from video.film import Film
from video.finding import Keyframes, find_keyframes
from video.reader import Picture
from video.sheets import captions, clock, score_curve


@dataclass(frozen=True)
class Moments:
    """What is known so far.  times: of the frames on the contact sheet, seconds."""

    seen: Image.Image | None = None
    sheet: tuple[tuple[Image.Image, str], ...] = ()
    times: tuple[float, ...] = ()
    curve: Image.Image | None = None
    figures: tuple[tuple[str, str], ...] = ()


class Halted(BaseException):
    """Somebody stopped the run; nothing went wrong."""


def find_live(
    file: Path,
    search: str,
    detector: str,
    targets: Sequence[str],
    cues: Sequence[str],
    frames: int,
    budget: float,
    stop: Event,
    show: Callable[[Moments], None],
) -> None:
    """Finds keyframes; when `stop` is set, it ends at the next look, with nothing found."""
    watched = Watched(resolve(detector, Detector), stop, show)
    with Film(file) as film:
        try:
            found = find_keyframes(film, search, watched, targets, cues, frames=frames, budget=budget)
        except Halted:
            show(dataclasses.replace(watched.state, figures=(*watched.state.figures, ("stopped", "before the end"))))
            return
    show(_found(found, watched.state, ", ".join(targets)))


def _found(found: Keyframes, state: Moments, title: str) -> Moments:
    spent, known = found.ledger.spent, ~np.isnan(found.curve)
    drawn = io.BytesIO()
    if known.any():
        score_curve(found, drawn, title)
    figures = [
        ("frames looked at", f"{spent.get('frames', 0)} of {len(found.seconds)}"),
        ("detector calls", str(spent.get("detector_calls", 0))),
        *((f"verified: {phrase}", clock(second)) for phrase, second in found.verified.items()),
        *(("note", note) for note in found.notes),
    ]
    return dataclasses.replace(
        state,
        sheet=tuple(
            (Image.fromarray(frame), text) for frame, text in zip(found.frames.pictures, captions(found), strict=True)
        ),
        times=tuple(found.times.tolist()),
        curve=Image.open(drawn) if known.any() else None,
        figures=tuple(figures),
    )


class Watched:
    """A detector that shows what it looks at, and that can be stopped."""

    def __init__(self, detector: Any, stop: Event, show: Callable[[Moments], None]) -> None:
        self.detector, self.stop, self.show = detector, stop, show
        self.whole_pictures = getattr(detector, "whole_pictures", False)
        self.state = Moments()
        self.calls = 0

    def __call__(self, pictures: Sequence[Picture], phrases: Sequence[str]) -> list[Detections]:
        if self.stop.is_set():
            raise Halted
        answers: list[Detections] = self.detector(pictures, phrases)
        self.calls += 1
        figures = (("detector calls so far", str(self.calls)),)
        self.state = dataclasses.replace(self.state, seen=Image.fromarray(pictures[-1]), figures=figures)
        self.show(self.state)
        return answers
