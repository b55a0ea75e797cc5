"""Frames of a video by presentation time, whichever library reads them.

Time runs in seconds from the first frame of the first video stream.  A frame is shown from its own time stamp until the
next frame's: the frame *at* t is the one whose interval holds t, at constant and at variable rates alike.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]  # [height, width, 3], RGB, upright
Times = NDArray[np.float64]


@dataclass(frozen=True)
class Frame:
    """One frame: when it came on, how it looks, and whether it is undamaged and the very one that was asked for."""

    time: float
    picture: Picture
    exact: bool = True


@dataclass(frozen=True)
class Frames:
    """The frames for a list of times, in the order of the times.

    times: when each frame came on, seconds, at or before the time that was asked for.  exact: False where the file is
    damaged and the nearest readable key frame stands in.
    """

    times: Times
    pictures: list[Picture]
    exact: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.pictures)


class Reader(ABC):
    """An open video.  Use it in a with-block, or call `close`.

    duration: seconds from the first frame until the last one goes off.  promised: what the file's header says, which is
    more for a truncated file.  height, width: of the upright pictures.  decoded: frames decoded so far.
    One thread reads at a time; several readers may share a file.
    """

    path: Path
    duration: float
    promised: float
    height: int
    width: int
    decoded: int

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @property
    def truncated(self) -> bool:
        """Whether the pictures end a second or more before the header says."""
        return self.promised - self.duration >= 1

    def frames_at(self, times: Sequence[float] | Times, short: int | None = None) -> Frames:
        """The frames at the given times, in any order and repeated at will; decoded in one pass in order of time.

        short: the shorter side in pixels, to which larger pictures are scaled with their aspect kept; None: as coded.
        Raises ValueError for a time outside the video and for a file in which no frame can be decoded.
        """
        wanted = np.asarray(times, dtype=np.float64).reshape(-1)
        if len(outside := wanted[~((wanted >= 0) & (wanted <= self.duration))]):
            cut = f" (its header says {self.promised:.3f}, but it is cut short)" if self.truncated else ""
            raise ValueError(
                f"{self.path} shows frames from 0 to {self.duration:.3f} seconds{cut}; asked for {outside[0]:.3f}"
            )
        ascending, places = np.unique(wanted, return_inverse=True)
        size = self._size(short)
        with self._lock:
            found = list(self._sweep(ascending, size)) if len(ascending) else []
        return Frames(
            np.array([found[place].time for place in places]),
            [found[place].picture for place in places],
            np.array([found[place].exact for place in places], dtype=bool),
        )

    def _size(self, short: int | None) -> tuple[int, int]:
        if short is None or short >= min(self.height, self.width):
            return self.height, self.width
        if short < 1:
            raise ValueError(f"the shorter side of a picture has at least one pixel; got short={short}")
        scale = short / min(self.height, self.width)
        return max(1, round(self.height * scale)), max(1, round(self.width * scale))

    @abstractmethod
    def _sweep(self, times: Times, size: tuple[int, int]) -> Iterator[Frame]:
        """The frames at ascending, distinct times, scaled to (height, width)."""

    @abstractmethod
    def close(self) -> None:
        """Closes the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_video(
    path: str | Path, backend: Literal["pyav", "opencv"] | None = None, threads: int | None = None
) -> Reader:
    """Opens a video file.

    backend: "pyav" (exact, and fast on scattered frames), "opencv" (exact too where the file has time stamps, slower);
    None takes PyAV if it is installed.  threads: of the decoder; None leaves it to the reader.
    Raises FileNotFoundError, ValueError for a file without readable video, ImportError that names the extra.
    """
    path = Path(path)
    if threads is not None and threads < 1:
        raise ValueError(f"a video is decoded by at least one thread; got threads={threads}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no video {str(path)!r}; give a video file, e.g. an .mp4")
    if backend is None:
        from importlib.util import find_spec

        backend = "opencv" if find_spec("av") is None and find_spec("cv2") else "pyav"
    if backend == "opencv":
        from video.opencv_reader import OpenCVReader

        return OpenCVReader(path, threads)
    if backend != "pyav":
        raise ValueError(f"videos are read by 'pyav' or by 'opencv'; got backend={backend!r}")
    from video.pyav_reader import PyAVReader

    return PyAVReader(path, threads)
