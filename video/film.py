"""An open video and all that was seen of it: questions after the first pay only for what is new."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np

from video.reader import Frames, Picture, Times, open_video

MEMORY = 64 * 2**20  # bytes of small pictures that are kept


class Film:
    """A video for one or many searches.  Use it in a with-block, or call `close`.

    path: the file.  short: the shorter side of the small pictures that detectors see, in pixels; larger ones show
    smaller things and cost more.  backend: see `open_video`.
    The small pictures read last are kept, up to 64 MiB of them; what detectors said is kept for good.
    """

    def __init__(self, path: str | Path, short: int = 96, backend: Literal["pyav", "opencv"] | None = None) -> None:
        if short < 1:
            raise ValueError(f"the pictures that a detector sees have at least one pixel a side; got short={short}")
        self.short = short
        self.reader = open_video(path, backend)
        self.seen: dict[tuple[Hashable, str, float, str], float] = {}
        """Confidences by detector, way of looking ("cell" or "frame"), time and phrase."""
        self._pictures: OrderedDict[float, Picture] = OrderedDict()
        self._kept = 0

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
        new = [time for time in dict.fromkeys(times) if time not in self._pictures]
        fresh = dict(zip(new, self.reader.frames_at(new, self.short).pictures, strict=True))
        for time in times:
            if time in self._pictures:
                self._pictures.move_to_end(time)
        found = [fresh[time] if time in fresh else self._pictures[time] for time in times]
        self._pictures.update(fresh)
        self._kept += sum(picture.nbytes for picture in fresh.values())
        while self._kept > MEMORY:
            self._kept -= self._pictures.popitem(last=False)[1].nbytes
        return found

    def frames(self, times: Sequence[float] | Times, short: int | None = None) -> Frames:
        """The frames at these times, in the file's own size or with the shorter side scaled to `short` pixels."""
        return self.reader.frames_at(times, short)

    def close(self) -> None:
        """Closes the file and forgets the pictures."""
        self.reader.close()
        self._pictures.clear()
        self._kept = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
