"""Small videos whose frames carry their numbers: what a reader returns can be held against what it should."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from video.reader import Picture

BITS, CELL = 12, 16
WIDTH, HEIGHT = BITS * CELL, 64
TICK = Fraction(1, 1000)


def numbered(number: int, height: int = HEIGHT) -> Picture:
    """A picture whose upper half is the number as black and white bars, above noise; bottom left is a bright mark."""
    picture = np.random.default_rng(number).integers(80, 105, (height, WIDTH, 3)).astype(np.uint8)
    bits = [255 * (number >> bit & 1) for bit in range(BITS)]
    picture[: height // 2] = np.repeat(bits, CELL)[None, :, None]
    picture[height // 2 :, :CELL] = 255
    return picture


def number_of(picture: Picture) -> int:
    """The number that a picture carries, at whatever scale."""
    height, width = picture.shape[:2]
    columns = ((np.arange(BITS) + 0.5) * width / BITS).astype(int)
    return int(sum(1 << bit for bit, column in enumerate(columns) if picture[height // 4, column].mean() > 128))


def film(
    path: Path,
    times: Sequence[int],
    *,
    group: int = 12,
    codec: str = "libx264",
    rotation: int = 0,
    container: dict[str, str] | None = None,
    hum: float = 0,
    **options: str,
) -> Path:
    """Writes a video whose frame i comes on at `times[i]` milliseconds; H.264 with two B-frames in a row by default.

    hum: seconds of silent sound beside it.
    """
    settings = {"preset": "ultrafast", "bf": "2", "crf": "23", **options} if codec == "libx264" else options
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=25, options=settings)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = stream.time_base = TICK
        stream.codec_context.gop_size = group
        if rotation:
            stream.set_display_rotation(rotation)
        if hum:
            beside = file.add_stream("aac", rate=8000)
            silence = av.AudioFrame.from_ndarray(
                np.zeros((1, int(hum * 8000)), np.float32), format="fltp", layout="mono"
            )
            silence.sample_rate = 8000
            hummed = [*beside.encode(silence), *beside.encode(None)]
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = time, TICK
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        file.mux(hummed if hum else [])
    return path


def steady(count: int, gap: int = 40) -> list[int]:
    """Time stamps of a constant rate, milliseconds."""
    return list(range(0, count * gap, gap))


def varying(count: int, seed: int = 0) -> list[int]:
    """Time stamps of a varying rate: gaps of 10 to 120 milliseconds."""
    return np.cumsum([0, *np.random.default_rng(seed).integers(10, 120, count - 1)]).tolist()


def cut(path: Path, share: float) -> Path:
    """The beginning of a file, as a copy beside it."""
    beside = path.with_name(f"cut-{path.name}")
    beside.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return beside


def scratched(path: Path, begin: float, length: int, seed: int = 0) -> Path:
    """A copy with random bytes from a share of the file on."""
    data = bytearray(path.read_bytes())
    place = int(begin * len(data))
    data[place : place + length] = np.random.default_rng(seed).bytes(length)
    beside = path.with_name(f"scratched-{path.name}")
    beside.write_bytes(data)
    return beside


def sound(path: Path) -> Path:
    """A second of silence, without pictures."""
    samples = 8000
    header = struct.pack(
        "<4sI8sIHHIIHH4sI", b"RIFF", 36 + samples, b"WAVEfmt ", 16, 1, 1, 8000, 8000, 1, 8, b"data", samples
    )
    path.write_bytes(header + bytes([128]) * samples)
    return path
