"""Samples as files: a PNG of a picture, an animated GIF of a video, a sheet of finalists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

SCALE = 192  # pixels of a finalist's shorter side on a sheet
CAPTION = 16  # pixels


def save(sample: Float[Tensor, "*frames 3 height width"], path: Path) -> Path:
    """Writes one sample in 0..1: a picture as PNG, a video as an animated GIF of 8 frames a second.

    path: without an ending, which is added.  Returns the file.
    """
    frames = [_image(frame) for frame in (sample if sample.ndim == 4 else sample[None])]
    if sample.ndim == 3:
        file = path.with_suffix(".png")
        frames[0].save(file)
    else:
        file = path.with_suffix(".gif")
        frames[0].save(file, save_all=True, append_images=frames[1:], duration=125, loop=0)
    return file


def sheet(samples: Float[Tensor, "rows *frames 3 height width"], captions: Sequence[str]) -> Image.Image:
    """All samples side by side with their captions, if there are any, a video by its frames from top to bottom."""
    tiles, band = [], CAPTION if any(captions) else 0
    for sample, caption in zip(samples, captions, strict=True):
        frames = [_enlarged(_image(frame)) for frame in (sample if sample.ndim == 4 else sample[None])]
        width, height = frames[0].size
        tile = Image.new("RGB", (width, band + height * len(frames)), "white")
        ImageDraw.Draw(tile).text((2, 2), caption, fill="black")
        for place, frame in enumerate(frames):
            tile.paste(frame, (0, band + place * height))
        tiles.append(tile)
    columns = min(len(tiles), 6)
    width, height = tiles[0].size
    whole = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for place, tile in enumerate(tiles):
        whole.paste(tile, ((place % columns) * width, (place // columns) * height))
    return whole


def _image(frame: Tensor) -> Image.Image:
    return Image.fromarray((frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy().astype(np.uint8))


def _enlarged(image: Image.Image) -> Image.Image:
    factor = max(1, SCALE // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
