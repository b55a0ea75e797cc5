"""Searches that score many seconds one by one and then choose, by pure functions of the scores.

AKS (Tang et al. 2025, arXiv:2502.21271) and BOLT (Liu et al. 2025, arXiv:2503.21483), beside plain retrieval and no
search at all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from video.search import Chosen, FrameSearch, Haystack, Positions, Scores, best, spaced

CHUNK = 64  # frames scored at a time


@dataclass(frozen=True, kw_only=True)
class Uniform(FrameSearch):
    """The middles of equal parts: looks at nothing."""

    name: ClassVar[str] = "uniform"

    def search(self, haystack: Haystack, count: int) -> Chosen:
        return Chosen(spaced(haystack.positions, count), np.full(haystack.positions, np.nan))


class DenseSearch(FrameSearch):
    """Base class of the searches that look at every second, or at as many as the budget allows, evenly spaced."""

    def search(self, haystack: Haystack, count: int) -> Chosen:
        looked = spaced(haystack.positions, min(haystack.positions, haystack.left))
        if len(looked) < count:
            raise ValueError(
                f"{self.name} chooses among the frames it has looked at, and the budget allows {len(looked)}; {count} "
                "frames need at least as many. Raise the budget, or use uniform, which looks at none"
            )
        chunks = [looked[start : start + CHUNK] for start in range(0, len(looked), CHUNK)]
        found = np.concatenate([haystack.relevance(haystack.frames(chunk)) for chunk in chunks])
        scores = np.full(haystack.positions, np.nan)
        scores[looked] = found
        return Chosen(looked[self.choose(found, count)], scores)

    @abstractmethod
    def choose(self, scores: Scores, count: int) -> Positions:
        """`count` different indices into the scores, ascending."""


@dataclass(frozen=True, kw_only=True)
class DenseRetrieval(DenseSearch):
    """The frames that score highest."""

    name: ClassVar[str] = "dense-retrieval"

    def choose(self, scores: Scores, count: int) -> Positions:
        return best(scores, count)


@dataclass(frozen=True, kw_only=True)
class AKS(DenseSearch):
    """Halves the video where its best frames do not stand out, so that relevance and coverage are balanced.

    stand_out: how far the mean of a segment's best normalised scores lies above its mean, for the segment to stay whole
    (t1); deviation: the least standard deviation for that (t2; off by default); depth: the most halvings, cut to what
    leaves every part a frame.  Unlike the release, what rounding takes away is filled with the best of the rest.
    """

    name: ClassVar[str] = "aks"

    stand_out: float = 0.8
    deviation: float = -100.0
    depth: int = 5

    def choose(self, scores: Scores, count: int) -> Positions:
        depth = min(self.depth, int(np.log2(count)))
        parts = adaptive_segments(scores, count, self.stand_out, self.deviation, depth)
        return filled(from_segments(scores, parts, count), scores, count)


@dataclass(frozen=True, kw_only=True)
class BOLT(DenseSearch):
    """Inverse-transform sampling: frames at even quantiles of the sharpened scores.

    power: how much the normalised scores are sharpened.  Unlike the release, a frame is chosen once, and the best of
    the rest stand in for repetitions.
    """

    name: ClassVar[str] = "bolt"

    power: float = 3.0

    def choose(self, scores: Scores, count: int) -> Positions:
        return filled(inverse_transform(scores, count, self.power), scores, count)


def normalised(scores: Scores) -> Scores:
    """Scores moved to [0, 1]; all 1 if they are equal."""
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else np.ones_like(scores)


def adaptive_segments(
    scores: Scores, count: int, stand_out: float, deviation: float, depth: int
) -> list[tuple[int, int, int]]:
    """AKS's accepted segments in the order of acceptance: (depth, length, first index)."""
    even = normalised(scores)
    waiting, accepted = deque([(0, 0, len(even))]), []
    while waiting:
        level, begin, end = waiting.popleft()
        part = even[begin:end]
        top = np.sort(part)[::-1][:count].mean()
        stands_out = top - part.mean() > stand_out and part.std() > deviation
        if stands_out or level >= depth or len(part) < 2:
            accepted.append((level, end - begin, begin))
        else:
            middle = begin + (end - begin) // 2
            waiting.extend([(level + 1, begin, middle), (level + 1, middle, end)])
    return accepted


def from_segments(scores: Scores, segments: list[tuple[int, int, int]], count: int) -> Positions:
    """The best int(count / 2^depth) indices of every segment, ascending."""
    chosen = [begin + best(scores[begin : begin + length], int(count / 2**level)) for level, length, begin in segments]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def inverse_transform(scores: Scores, count: int, power: float) -> Positions:
    """The first index at which the scores' distribution reaches each quantile, from 1/count to 1 - 1/count.

    An index may come several times.
    """
    weights = normalised(scores) ** power
    cumulated = np.cumsum(weights / weights.sum())
    quantiles = np.linspace(1 / count, 1 - 1 / count, count)
    return np.minimum(np.searchsorted(cumulated, quantiles), len(scores) - 1).astype(np.int64)


def filled(chosen: Positions, scores: Scores, count: int) -> Positions:
    """The chosen indices without repetitions, and the best of the rest, up to `count`, ascending."""
    once = np.unique(chosen)[:count]
    rest = np.argsort(-scores, kind="stable")
    rest = rest[~np.isin(rest, once)][: count - len(once)]
    return np.sort(np.concatenate([once, rest])).astype(np.int64)
