"""A haystack whose detector is a table: what a search does can be followed look by look."""

from __future__ import annotations

import numpy as np

from video.search import Haystack


class Table(Haystack):
    """cells, frames: confidences by position, [positions, phrases]; the first `targets` phrases are targets.

    budget: frames that may be looked at; verification is free of charge if `frames_are_free`, as in the release.
    """

    def __init__(self, cells, frames=None, *, targets=1, budget=None, cue=0.5, frames_are_free=False):
        self.in_cells = np.asarray(cells, dtype=float)
        self.alone = self.in_cells if frames is None else np.asarray(frames, dtype=float)
        self.positions, phrases = self.in_cells.shape
        self.targets = targets
        self.weights = np.where(np.arange(phrases) < targets, 1.0, cue)
        self.budget = 2 * self.positions if budget is None else budget
        self.free = frames_are_free
        self.looked: list[int] = []
        self.verified: list[int] = []

    def cells(self, positions, rows, columns):
        assert len(positions) <= rows * columns
        self.looked += list(positions)
        return self.in_cells[positions]

    def frames(self, positions):
        if not self.free:
            positions = positions[: self.left]
        self.verified += list(positions)
        return self.alone[positions]

    @property
    def left(self):
        return self.budget - len(self.looked) - (0 if self.free else len(self.verified))
