"""Plots of the library as pictures in memory."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from PIL import Image

from mmaccel.plots import curves


def drawn_curves(lines: Mapping[str, Sequence[tuple[float, float]]], title: str, x: str, y: str) -> Image.Image:
    """`mmaccel.plots.curves`, as a picture."""
    file = io.BytesIO()
    curves(lines, file, title=title, x=x, y=y, steps=True)
    return Image.open(file).convert("RGB")
