"""Writing videos, by PyAV, which is imported when one is written."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEY_SECONDS = 8  # between key frames, as encoders do by default at 30 frames a second


def write_film(path: str | Path, pictures: Iterable[NDArray[np.uint8]], rate: int, sharpness: int = 24) -> None:
    """Writes an H.264 video of pictures of one size, uint8 [height, width, 3], both sides even; the same for the same.

    rate: frames a second.  sharpness: libx264's rate factor; lower is sharper and larger.
    Raises ImportError that names the extra if PyAV is missing, ValueError if there are no pictures or sides are odd.
    """
    stream: Any = None
    av = _av()
    with av.open(str(path), "w") as file:
        for number, picture in enumerate(pictures):
            if stream is None:
                height, width = picture.shape[:2]
                if height % 2 or width % 2:
                    raise ValueError(f"H.264 videos have even sides; got pictures of {width} x {height} pixels")
                options = {"preset": "ultrafast", "bf": "2", "crf": str(sharpness)}
                stream = file.add_stream("libx264", rate=rate, options=options)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.gop_size = KEY_SECONDS * rate
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            file.mux(stream.encode(frame))
        if stream is None:
            raise ValueError("a video needs at least one picture; got none")
        file.mux(stream.encode(None))


def _av() -> Any:
    try:
        return import_module("av")
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f'videos are written by PyAV, which cannot be imported ({error}); install it: pip install "mmaccel[video]"'
        ) from error
