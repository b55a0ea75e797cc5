"""Reading by OpenCV: seek some way back, go forward by the frames' own time stamps.  The second backend.

OpenCV seeks by an average rate, which is off where the rate varies, and says nothing of damaged bytes; so positions are
never believed, only the time stamp of each frame read, and every frame of a damaged file passes as exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from video.reader import Frame, Picture, Reader, Times

BACK = 1.0  # seconds before a time at which reading starts; doubled until a frame at or before the time is met
NEARBY = 2.0  # seconds that are read on rather than sought
SAME = 1e-6  # seconds


class OpenCVReader(Reader):
    """A video, open in OpenCV.  See `Reader`; the duration is what the header says, threads its own unless given."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        super().__init__()
        self.cv2 = _cv2()
        self.path, self.decoded = path, 0
        self.settings = [] if threads is None else [self.cv2.CAP_PROP_N_THREADS, threads]
        self.capture = self.cv2.VideoCapture(str(path), self.cv2.CAP_FFMPEG, self.settings)
        self.first = 0.0
        first = self._read() if self.capture.isOpened() else None
        if first is None:
            self.capture.release()
            raise ValueError(f"{path} cannot be read as a video: OpenCV finds no frame in it")
        self.first, picture = first
        self.height, self.width = picture.shape[:2]
        rate, count = (self.capture.get(which) for which in (self.cv2.CAP_PROP_FPS, self.cv2.CAP_PROP_FRAME_COUNT))
        if rate <= 0 or count <= 0:
            self.capture.release()
            raise ValueError(f"{path}: OpenCV cannot tell how long it is; read it with PyAV, or remux it to .mp4")
        self.rate = rate
        self.duration = self.promised = count / rate

    def _read(self) -> tuple[float, Picture] | None:
        """The next frame and its time, in RGB; None at the end of what can be read."""
        read, picture = self.capture.read()
        if not read:
            return None
        self.decoded += 1
        return self.capture.get(self.cv2.CAP_PROP_POS_MSEC) / 1000 - self.first, np.ascontiguousarray(
            picture[..., ::-1]
        )

    def _sweep(self, times: Times, size: tuple[int, int]) -> Iterator[Frame]:
        shown, following = self._seek(float(times[0]))
        for time in times.tolist():
            if following is not None and time - following[0] > NEARBY:
                shown, following = self._seek(time)
            while following is not None and following[0] <= time + SAME:
                shown, following = following, self._read()
            yield Frame(shown[0], self._scaled(shown[1], size))

    def _seek(self, time: float) -> tuple[tuple[float, Picture], tuple[float, Picture] | None]:
        """A frame that comes on at or before the time (the file's first, if none does), and the next one."""
        back = BACK
        while True:
            place = max(0, math.floor((time - back) * self.rate))
            if place:
                self.capture.set(self.cv2.CAP_PROP_POS_FRAMES, place)
            else:
                self.capture.open(str(self.path), self.cv2.CAP_FFMPEG, self.settings)
            frame = self._read()
            if frame is not None and (frame[0] <= time + SAME or place == 0):
                return frame, self._read()
            if place == 0:
                raise ValueError(f"{self.path} is damaged: no frame can be decoded near {time:.3f} seconds")
            back *= 2

    def _scaled(self, picture: Picture, size: tuple[int, int]) -> Picture:
        if picture.shape[:2] == size:
            return picture
        smaller: Picture = self.cv2.resize(picture, size[::-1], interpolation=self.cv2.INTER_AREA)
        return smaller

    def close(self) -> None:
        self.capture.release()


def _cv2() -> Any:
    try:
        return import_module("cv2")
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f'this needs OpenCV, which cannot be imported ({error}); install it: pip install "mmaccel[video]"'
        ) from error
