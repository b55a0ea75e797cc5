"""Finding keyframes: a search, a detector and a video brought together, and what that cost."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmaccel.ledger import Ledger
from mmaccel.named import resolve
from video.dense import Uniform
from video.detectors import Detector, as_grid, by_cell, confidences, detect
from video.film import Film
from video.reader import Frames, Times
from video.search import FrameSearch, Haystack, Positions, Scores

CUE = 0.5  # what a cue's confidence counts beside a target's
EMPTY: tuple[str, ...] = ()


@dataclass(frozen=True)
class Keyframes:
    """The frames that a search chose, and what it saw and spent on the way.

    times: when each frame comes on, ascending, seconds; exact: False for a frame that stands in for a damaged one.
    scores: their relevance, NaN where nobody looked.  seconds, curve: every time that could have been chosen and its
    relevance.  verified: by target, when it was seen in a frame of its own.  ledger: frames looked at, detector calls,
    and the seconds they took.  notes: what the caller should know, such as a file that is cut short.
    """

    frames: Frames
    scores: Scores
    seconds: Times
    curve: Scores
    verified: dict[str, float]
    ledger: Ledger
    notes: tuple[str, ...] = EMPTY

    @property
    def times(self) -> Times:
        """When each frame comes on, ascending, seconds."""
        return self.frames.times

    @property
    def share(self) -> float:
        """Frames looked at, over the times that could have been chosen."""
        return self.ledger.spent.get("frames", 0) / len(self.seconds)

    @property
    def facts(self) -> dict[str, Any]:
        """What was found, as plain data; None stands for the score of a frame that nobody looked at."""
        return {
            "seconds": self.times.tolist(),
            "scores": [None if score != score else float(score) for score in self.scores],
            "verified": self.verified,
            "notes": list(self.notes),
            "spent": self.ledger.spent,
        }


def find_keyframes(
    film: Film,
    search: Any,
    detector: Any,
    targets: Sequence[str],
    cues: Sequence[str] = EMPTY,
    *,
    frames: int = 8,
    budget: float | int = 0.5,
    short: int | None = None,
) -> Keyframes:
    """The `frames` frames of a video that show the targets best, by a search with a detector.

    search, detector: objects, names or dictionaries.  targets, cues: phrases; a cue is what is seen near a target, and
    counts half.  budget: the most frames that may be looked at, a share of the video's seconds or a whole number; it is
    never overrun.  short: the shorter side of the frames that are returned, in pixels; None: as in the file.
    Raises ValueError for no frames, no targets, more frames than the video has, and phrases a detector cannot read.
    """
    search, detector = resolve(search, FrameSearch), resolve(detector, Detector)
    if frames < 1:
        raise ValueError(f"at least one frame is to be chosen; got frames={frames}")
    if not targets and not isinstance(search, Uniform):
        raise ValueError(
            f"{search.name} looks for something, and no targets were given; name some, e.g. "
            'targets=["red triangle"], or choose evenly spaced frames with the search "uniform"'
        )
    seconds = film.seconds(frames)
    ledger = Ledger({"frames": most_frames(budget, len(seconds))})
    haystack = FilmHaystack(film, detector, targets, cues, seconds, ledger)
    chosen = search.search(haystack, frames)
    with ledger.spend("keyframes", frames):
        found = film.frames(seconds[chosen.positions], short)
    if (different := len(set(found.times))) < frames:
        raise ValueError(
            f"{film.path} is short: {frames} frames were asked for, and it has {different} different ones at the times "
            f"that were chosen; ask for frames={different}"
        )
    return Keyframes(
        found,
        chosen.scores[chosen.positions],
        seconds,
        chosen.scores,
        {haystack.phrases[number]: float(seconds[position]) for number, position in chosen.verified.items()},
        ledger,
        tuple(_notes(film, found)),
    )


def most_frames(budget: float | int, total: int) -> int:
    """The frames that a budget allows of `total`.  Raises ValueError, with the mend, for a budget that is none."""
    if isinstance(budget, float) and 0 < budget <= 1:
        return max(1, int(budget * total))
    if isinstance(budget, int) and not isinstance(budget, bool) and budget >= 2:
        return budget
    raise ValueError(
        "the budget of a search is a share of the video's seconds in (0, 1], or a number of frames from 2 up; "
        f"got {budget!r}"
    )


def _notes(film: Film, found: Frames) -> list[str]:
    notes, reader = [], film.reader
    if reader.truncated:
        ends = f"its header says {reader.promised:.1f} s, its pictures end at {reader.duration:.1f} s"
        notes.append(f"the file is cut short: {ends}")
    if not found.exact.all():
        notes.append(f"the file is damaged: key frames nearby stand in for {int((~found.exact).sum())} frames")
    return notes


class FilmHaystack(Haystack):
    """A film, a detector and phrases, as a search sees them.  Looks are paid before they are taken, and only once."""

    def __init__(
        self, film: Film, detector: Any, targets: Sequence[str], cues: Sequence[str], seconds: Times, ledger: Ledger
    ) -> None:
        self.film, self.detector, self.seconds, self.ledger = film, detector, seconds, ledger
        self.phrases = list(dict.fromkeys([*targets, *cues]))
        self.targets = len(dict.fromkeys(targets))
        self.weights = np.where(np.arange(len(self.phrases)) < self.targets, 1.0, CUE)
        self.positions = len(seconds)
        self._key: Hashable = detector if isinstance(detector, Hashable) else id(detector)

    @property
    def left(self) -> int:
        left = self.ledger.left("frames")
        return self.positions if left is None else left

    def cells(self, positions: Positions, rows: int, columns: int) -> Scores:
        if getattr(self.detector, "whole_pictures", False):
            return self.frames(positions)
        new = self._unseen(positions, "cell")
        if len(new):
            with self.ledger.spend("frames", len(new)):
                grid = as_grid(self.film.pictures(self.seconds[new].tolist()), rows, columns)
            with self.ledger.spend("detector_calls", 1):
                (found,) = detect(self.detector, [grid], self.phrases)
            size = (grid.shape[0], grid.shape[1])
            self._note("cell", new, by_cell(found, size, rows, columns, len(self.phrases))[: len(new)])
        return self._known(positions, "cell")

    def frames(self, positions: Positions) -> Scores:
        new = self._unseen(positions, "frame")
        if len(new) > self.left:
            beyond = new[self.left :]
            positions = positions[: int(np.flatnonzero(positions == beyond[0])[0])]
            new = new[: self.left]
        if len(new):
            with self.ledger.spend("frames", len(new)):
                pictures = self.film.pictures(self.seconds[new].tolist())
            with self.ledger.spend("detector_calls", len(new)):
                found = detect(self.detector, pictures, self.phrases)
            self._note("frame", new, confidences(found, len(self.phrases)))
        return self._known(positions, "frame")

    def _tables(self, way: str) -> list[Scores]:
        """What was said so far of each phrase at every position; NaN where nothing was."""
        return [
            self.film.seen.setdefault((self._key, way, phrase, self.positions), np.full(self.positions, np.nan))
            for phrase in self.phrases
        ]

    def _unseen(self, positions: Positions, way: str) -> Positions:
        return positions[np.isnan(self._known(positions, way)).any(axis=1)]

    def _note(self, way: str, positions: Positions, found: Scores) -> None:
        for table, column in zip(self._tables(way), found.T, strict=True):
            table[positions] = column

    def _known(self, positions: Positions, way: str) -> Scores:
        rows = [table[positions] for table in self._tables(way)]
        return np.stack(rows, axis=1) if rows else np.empty((len(positions), 0))
