"""Keyframes as files: a contact sheet, and the score over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageDraw

from mmaccel.plots import curves
from video.finding import Keyframes

TILE = 240  # pixels of a frame's longer side
CAPTION = 16  # pixels
COLUMNS = 4


def clock(seconds: float) -> str:
    """A time as people write it: 3725.5 as "1:02:05.5", 65 as "1:05.0"."""
    tenths = round(seconds * 10)
    hours, minutes, rest = tenths // 36000, tenths // 600 % 60, tenths % 600 / 10
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


def contact_sheet(found: Keyframes) -> Image.Image:
    """The chosen frames in order of time, each with its time and its score."""
    tiles = [_tile(*one) for one in zip(found.frames.pictures, captions(found), strict=True)]
    columns = min(len(tiles), COLUMNS)
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place % columns * width, place // columns * height))
    return sheet


def captions(found: Keyframes) -> Sequence[str]:
    """A line a frame: its time, and its score if anybody looked."""
    return [
        clock(time) if np.isnan(score) else f"{clock(time)}  {score:.2f}"
        for time, score in zip(found.times, found.scores, strict=True)
    ]


def score_curve(found: Keyframes, path: Path | IO[bytes], title: str) -> None:
    """Draws the relevance of every second that is known, and the chosen frames on it.

    Raises ValueError if nothing was looked at, ImportError that names the extra if matplotlib is missing.
    """
    known = ~np.isnan(found.curve)
    if not known.any():
        raise ValueError("this search looked at nothing, so there is no score over time to draw")
    lines = {
        "relevance": list(zip(found.seconds[known].tolist(), found.curve[known].tolist(), strict=True)),
        "keyframes": list(zip(found.times.tolist(), np.nan_to_num(found.scores).tolist(), strict=True)),
    }
    curves(lines, path, title=title, x="seconds", y="relevance")


def _tile(picture: np.ndarray[tuple[int, int, int], np.dtype[np.uint8]], caption: str) -> Image.Image:
    image = Image.fromarray(picture)
    scale = TILE / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    tile = Image.new("RGB", (image.width, image.height + CAPTION), "white")
    tile.paste(image, (0, CAPTION))
    ImageDraw.Draw(tile).text((2, 2), caption, fill="black")
    return tile
