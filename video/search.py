"""A search: what chooses the few frames of a video.  It sees a `Haystack`, never a file or a detector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mmaccel.named import Named, NamedField

Positions = NDArray[np.int64]
Scores = NDArray[np.float64]


class Haystack(ABC):
    """A video as a search sees it: evenly spaced positions, one a second as a rule, and what a detector says of them.

    positions: how many there are.  weights: of the phrases looked for, [phrases]: 1 for the targets, which come first,
    and less for the cues.  targets: how many phrases are targets.
    """

    positions: int
    weights: Scores
    targets: int

    @abstractmethod
    def cells(self, positions: Positions, rows: int, columns: int) -> Scores:
        """The best confidence of each phrase in each position's cell of one grid picture, [positions, phrases]."""

    @abstractmethod
    def frames(self, positions: Positions) -> Scores:
        """The best confidence of each phrase in each position's own picture, [positions, phrases].

        Where the budget has no room for all, the first ones it has room for.
        """

    @property
    @abstractmethod
    def left(self) -> int:
        """How many frames may still be looked at."""

    def relevance(self, confidences: Scores) -> Scores:
        """One score a row: the best weighted confidence, [positions, phrases] -> [positions]."""
        return np.asarray((confidences * self.weights).max(axis=1))


@dataclass
class Chosen:
    """What a search found.

    positions: the chosen ones, ascending, all different.  scores: the relevance of every position of the video, NaN
    where nothing is known.  verified: targets (by number) that were seen in a frame of their own, and where.
    """

    positions: Positions
    scores: Scores
    verified: dict[int, int] = field(default_factory=dict)


class FrameSearch(Named):
    """Base class of the searches.  A subclass is a frozen dataclass with its settings and one function."""

    kind: ClassVar[str] = "search"

    @classmethod
    def group(cls) -> str:
        return "mmaccel.keyframe_searches"

    @abstractmethod
    def search(self, haystack: Haystack, count: int) -> Chosen:
        """Chooses `count` positions, which is at most as many as there are."""


SearchField = Annotated[Any, NamedField(FrameSearch)]
"""The type of a dataclass field that holds a search."""


def best(scores: Scores, count: int) -> Positions:
    """The `count` positions that score highest, ascending; ties keep the earlier one, NaN comes last."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def spaced(total: int, count: int) -> Positions:
    """The middles of `count` equal parts of `total` positions; all different while count <= total."""
    return ((np.arange(count) + 0.5) * total / count).astype(np.int64)
