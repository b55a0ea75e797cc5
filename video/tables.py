"""A haystack whose detector is a table: what it says of every second, once for all searches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmaccel.named import resolve
from video.detectors import Detector, confidences, detect
from video.film import Film
from video.search import Haystack, Positions, Scores

CHUNK = 64  # pictures shown to the detector at a time


class TableHaystack(Haystack):
    """Says the same of a second in a cell and alone.

    table: confidences, [positions, phrases], the first phrase the only target.  budget: the most looks; `looks` counts.
    """

    def __init__(self, table: Scores, weights: Scores, budget: int | None = None) -> None:
        self.table, self.weights, self.targets = table, weights, 1
        self.positions = len(table)
        self.budget = 2 * self.positions if budget is None else budget
        self.looks = 0

    @property
    def left(self) -> int:
        return self.budget - self.looks

    def cells(self, positions: Positions, rows: int, columns: int) -> Scores:
        self.looks += len(positions)
        return self.table[positions]

    def frames(self, positions: Positions) -> Scores:
        seen = positions[: self.left]
        self.looks += len(seen)
        return self.table[seen]


def table_of(film: Film, detector: Any, phrases: Sequence[str]) -> Scores:
    """What a detector says of every second of a film, each in a picture of its own: [seconds, phrases]."""
    seen_by, seconds = resolve(detector, Detector), film.seconds(1)
    chunks = [seconds[start : start + CHUNK].tolist() for start in range(0, len(seconds), CHUNK)]
    return np.concatenate(
        [confidences(detect(seen_by, film.pictures(chunk), phrases), len(phrases)) for chunk in chunks]
    )
