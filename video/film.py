"""An open video and all that was seen of it: questions after the first pay only for what is new."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from video.reader import Frames, Picture, Times, open_video
from video.search import Scores

MEMORY = 8 * 2**20  # bytes of small pictures that are kept: about 300 square ones


class Film:
    """A video for one or many searches.  Use it in a with-block, or call `close`.

    path: the file.  short: the shorter side of the small pictures that detectors see, in pixels; larger ones show
    smaller things and cost more.  backend: see `open_video`.
    The small pictures looked at last are kept, in 8 MiB that are taken at once, however long the video is; and all that
    detectors said, 8 bytes a second, phrase and way of looking.
    """

    def __init__(self, path: str | Path, short: int = 96, backend: Literal["pyav", "opencv"] | None = None) -> None:
        if short < 1:
            raise ValueError(f"the pictures that a detector sees have at least one pixel a side; got short={short}")
        self.short = short
        self.reader = open_video(path, backend)
        self.seen: dict[tuple[Hashable, str, str, int], Scores] = {}
        """Confidences at every position, NaN where unseen, by detector, way of looking, phrase and positions."""
        self._kept: NDArray[np.uint8] | None = None  # [slots, height, width, 3]
        self._slots: OrderedDict[float, int] = OrderedDict()  # by time; the one looked at last comes last

    @property
    def path(self) -> Path:
        """The file."""
        return self.reader.path

    def seconds(self, least: int) -> Times:
        """The times that a search chooses from: every whole second, or `least` evenly spaced ones in a short video."""
        whole = int(self.reader.duration)
        return np.arange(whole, dtype=float) if whole >= least else np.arange(least) * self.reader.duration / least

    def pictures(self, times: Sequence[float]) -> list[Picture]:
        """The small pictures at these times; only those that are not kept are read."""
        new = [time for time in dict.fromkeys(times) if time not in self._slots]
        fresh = dict(zip(new, self.reader.frames_at(new, self.short).pictures, strict=True))
        found = [fresh[time] if time in fresh else self._picture(time) for time in times]
        for time, picture in zip(times, found, strict=True):
            self._keep(time, picture)
        return found

    def _picture(self, time: float) -> Picture:
        assert self._kept is not None  # a slot has a time only where there are slots
        return np.array(self._kept[self._slots[time]])

    def _keep(self, time: float, picture: Picture) -> None:
        if self._kept is None:
            self._kept = np.full((MEMORY // picture.nbytes, *picture.shape), 0, np.uint8)  # written to, so it is there
        if time in self._slots:
            self._slots.move_to_end(time)
        elif len(self._kept):
            full = len(self._slots) == len(self._kept)
            slot = self._slots.popitem(last=False)[1] if full else len(self._slots)
            self._kept[slot], self._slots[time] = picture, slot

    def frames(self, times: Sequence[float] | Times, short: int | None = None) -> Frames:
        """The frames at these times, in the file's own size or with the shorter side scaled to `short` pixels."""
        return self.reader.frames_at(times, short)

    def close(self) -> None:
        """Closes the file and forgets the pictures."""
        self.reader.close()
        self._slots.clear()
        self._kept = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
