"""T*: temporal search as spatial search.

Many frames as one picture: a detector looks at a grid of them, what it finds says where to look next, and a find is
verified in a frame of its own.  Source: Ye et al. 2025 (arXiv:2504.02259), section 4 and its released code.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from video.search import Chosen, FrameSearch, Haystack, Positions, Scores, best, spaced

START = 1e-6  # every score at first
SMOOTHING = 0.5  # of the spline
QUANTILE = 75  # per cent: which cells spread their score, and which positions may be drawn
FLOOR = 0.1  # what a position promises of which nothing is known, on the scale of confidences


@dataclass(frozen=True)
class Round:
    """One grid: the positions looked at, the probabilities they were drawn with, and what is known after it.

    probabilities and distribution are None where nothing is drawn.  scores: before verification.
    """

    sampled: Positions
    probabilities: Scores | None
    distribution: Scores | None
    scores: Scores


@dataclass(frozen=True, kw_only=True)
class TStar(FrameSearch):
    """Looks at grids of frames, goes where they promise something, and verifies what it finds in single frames.

    rows, columns: of a grid.  threshold: the confidence above which a single frame verifies a target; the search ends
    when all are.  spread: how many seconds a score reaches to either side.
    proposal: where to look next.  "gaps" (ours): the position with the greatest product of promise and distance from
    all that was looked at, one after the other; promise is interpolated linearly between the scores, so a find draws
    looks in proportion to the gaps around it, and without any find the order is even.  "spline" (the release): drawn at
    random from the upper quarter of the spline's distribution, which is nearly flat.
    verification: "own" takes a target's own confidence; "any" (the release) the best weighted one of any phrase.
    selection: "top", the highest scores, as the paper says; "draw", at random in proportion to them, as the release
    does.  seed: of the draws.
    Unlike the release, a round's frames are verified in one call, verification frames count against the budget, a
    verified score is spread, the last grid shrinks to what the budget has left, and there is no blank class.
    """

    name: ClassVar[str] = "tstar"

    rows: int = 4
    columns: int = 4
    threshold: float = 0.6
    spread: int = 5
    proposal: Literal["gaps", "spline"] = "gaps"
    verification: Literal["own", "any"] = "own"
    selection: Literal["top", "draw"] = "top"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1 or self.spread < 0:
            raise ValueError(
                f"a grid has at least one row and one column, and scores spread 0 seconds or more; got rows="
                f"{self.rows}, columns={self.columns}, spread={self.spread}"
            )
        if not 0 <= self.threshold < 1:
            raise ValueError(f"the threshold is a confidence in [0, 1); got {self.threshold!r}")

    def search(self, haystack: Haystack, count: int) -> Chosen:
        rng = np.random.RandomState(self.seed)  # the legacy generator: its stream is fixed for ever, and the release's
        found = Chosen(np.empty(0, np.int64), np.full(haystack.positions, START))
        for _ in self.rounds(haystack, found, rng):
            pass
        found.positions = select(found.scores, count, rng if self.selection == "draw" else None)
        return found

    def rounds(self, haystack: Haystack, found: Chosen, rng: np.random.RandomState) -> Generator[Round, None, None]:
        """Looks, round by round, until all targets are verified, all is seen or nothing is left to spend."""
        visited = np.zeros(haystack.positions, dtype=bool)
        distribution: Scores | None = None
        while len(found.verified) < haystack.targets and not visited.all() and haystack.left > 0:
            count = min(self.rows * self.columns, haystack.left)
            sampled, probabilities = self._propose(found.scores, visited, distribution, count, rng)
            confidences = haystack.cells(sampled, self.rows, self.columns)
            cells = haystack.relevance(confidences)
            visited[sampled] = True
            found.scores[sampled] = cells
            found.scores[:] = spread_scores(found.scores, sampled, cells, self.spread)
            if self.proposal == "spline":
                distribution = spline_distribution(found.scores, visited)
            yield Round(sampled, probabilities, distribution, found.scores.copy())
            self._verify(haystack, found, sampled, confidences)

    def _propose(
        self,
        scores: Scores,
        visited: NDArray[np.bool_],
        distribution: Scores | None,
        count: int,
        rng: np.random.RandomState,
    ) -> tuple[Positions, Scores | None]:
        if self.proposal == "gaps":
            if not visited.any():
                return spaced(len(scores), min(count, len(scores))), None
            promise = np.maximum(interpolated(scores, visited), 0) + FLOOR
            return widest_gaps(promise, visited, count), None
        if distribution is None:
            return first_positions(len(scores), count), None
        probabilities = draw_probabilities(distribution, visited, count)
        return rng.choice(len(scores), min(count, len(scores)), replace=False, p=probabilities), probabilities

    def _verify(self, haystack: Haystack, found: Chosen, sampled: Positions, confidences: Scores) -> None:
        """Looks at frames in whose cells unverified targets were found, the surest first while the budget lasts."""
        wanted = [target for target in range(haystack.targets) if target not in found.verified]
        named = confidences[:, wanted]
        rows = [row for row in np.argsort(-named.max(axis=1), kind="stable") if named[row].max() > 0]
        if self.verification == "any":
            for row in sorted(rows):
                self._verify_as_released(haystack, found, sampled[[row]], confidences[row])
        elif rows:
            self._verify_own(haystack, found, sampled[rows], wanted)

    def _verify_own(self, haystack: Haystack, found: Chosen, positions: Positions, wanted: list[int]) -> None:
        """All frames at once: each target by its own confidence."""
        for position, confidence in zip(positions, haystack.frames(positions), strict=False):  # a budget may cut them
            found.scores[position] = float((confidence * haystack.weights).max())
            sure = [target for target in wanted if confidence[target] > self.threshold]
            found.verified |= {target: int(position) for target in sure if target not in found.verified}
            if sure:
                near = np.array([position])
                found.scores[:] = spread_scores(found.scores, near, found.scores[near], self.spread)

    def _verify_as_released(self, haystack: Haystack, found: Chosen, position: Positions, cell: Scores) -> None:
        """One frame: the best weighted confidence of any phrase stands for the target's own, of one target at most."""
        named = [target for target in range(haystack.targets) if target not in found.verified and cell[target] > 0]
        if not named:
            return
        alone = haystack.frames(position)
        if not len(alone):
            return
        found.scores[position] = value = float(haystack.relevance(alone)[0])
        sure = [target for target in named if alone[0, target] > 0 and value > self.threshold]
        found.verified |= {target: int(position[0]) for target in sure[:1]}


def first_positions(total: int, count: int) -> Positions:
    """Positions at a whole stride from the first on: `count` of them, or all if there are fewer."""
    return (np.arange(total) if total <= count else np.arange(count) * (total // count)).astype(np.int64)


def spread_scores(scores: Scores, sampled: Positions, cells: Scores, reach: int) -> Scores:
    """Lets the best quarter of the sampled positions raise their neighbours' scores, by 1 / (distance + 1).

    In the order of sampling, so that a later one passes on what it received.  scores: [positions]; cells: [sampled],
    by which the quarter is taken.
    """
    spread = scores.copy()
    least = np.percentile(cells, QUANTILE)
    for position in sampled[cells >= least]:
        near = np.arange(max(0, position - reach), min(len(scores), position + reach + 1))
        spread[near] = np.maximum(spread[near], spread[position] / (np.abs(near - position) + 1))
    return spread


def spline_distribution(scores: Scores, visited: NDArray[np.bool_]) -> Scores:
    """The distribution over all positions that a cubic smoothing spline through the visited scores gives; sums to 1.

    sigmoid(max(1 / positions, spline)), normalised.  With fewer than four visited positions, which no cubic fits, the
    spline's place is taken by linear interpolation; with none the distribution is even.
    """
    total, seen = len(scores), np.flatnonzero(visited)
    if not len(seen):
        return np.full(total, 1 / total)
    if len(seen) > 3:
        from scipy.interpolate import UnivariateSpline

        smooth = UnivariateSpline(seen, scores[seen], k=3, s=SMOOTHING)(np.arange(total))
    else:
        smooth = interpolated(scores, visited)
    weights = 1 / (1 + np.exp(-np.maximum(1 / total, smooth)))
    return np.asarray(weights / weights.sum())


def draw_probabilities(distribution: Scores, visited: NDArray[np.bool_], count: int) -> Scores:
    """The release's probabilities of the next draw: the upper quarter of what was not visited, nearly even within it.

    Where fewer than `count` positions remain there, visited ones may be drawn again.
    """
    raised = distribution + count / len(distribution)
    open_ones = raised * ~visited
    eligible = np.where(open_ones >= np.percentile(open_ones, QUANTILE), open_ones, 0)
    if np.count_nonzero(eligible) < min(count, len(distribution)):
        eligible = raised
    return np.asarray(eligible / eligible.sum())


def interpolated(scores: Scores, visited: NDArray[np.bool_]) -> Scores:
    """The scores of the visited positions, joined by straight lines: [positions]."""
    seen = np.flatnonzero(visited)
    return np.interp(np.arange(len(scores)), seen, scores[seen])


def widest_gaps(promise: Scores, visited: NDArray[np.bool_], count: int) -> Positions:
    """Up to `count` new positions, each with the greatest promise times distance from all visited and chosen ones.

    promise: positive, [positions].  Ascending.  With an even promise this halves the widest gap, again and again.
    """
    places = np.arange(len(promise))
    seen = np.flatnonzero(visited)
    after = np.searchsorted(seen, places)
    far = len(promise)
    left = np.where(after > 0, places - seen[np.maximum(after - 1, 0)], far)
    right = np.where(after < len(seen), seen[np.minimum(after, len(seen) - 1)] - places, far)
    distance = np.minimum(left, right)
    chosen: list[int] = []
    while len(chosen) < count and distance.any():
        chosen.append(int(np.argmax(promise * distance)))
        distance = np.minimum(distance, np.abs(places - chosen[-1]))
    return np.array(sorted(chosen), dtype=np.int64)


def select(scores: Scores, count: int, rng: np.random.RandomState | None = None) -> Positions:
    """The `count` best positions, ascending; with `rng`, drawn without replacement in proportion to the scores.

    Where fewer positions than `count` have a chance of being drawn, the best of the rest join them.
    """
    if rng is None:
        return best(scores, count)
    total = scores.sum()
    likely = np.count_nonzero(scores > 0)
    if likely < count:
        return best(scores, count)
    return np.sort(rng.choice(len(scores), count, replace=False, p=scores / total)).astype(np.int64)
