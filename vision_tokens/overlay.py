"""Drawings of which visual tokens stayed, on what the encoder saw.

A kept cell shows the picture as it is, inside a bright outline where others are dropped; a dropped one is dimmed; a
cell that never reaches the language model (the padding of tiles) is black.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vision_tokens.layout import Layout

SIDE = 288  # pixels that a partition's longer side gets, about
GAP = 8  # pixels between two drawings
WIDTH = 1260  # pixels that a sheet's panels may take side by side
DIM = 0.28  # of a dropped cell's brightness is left
OUTLINE, GRID, PAPER, INK = (255, 214, 64), (96, 96, 104), (250, 250, 248), (24, 24, 28)


@dataclass(frozen=True)
class Panel:
    """A drawing with the text under it."""

    picture: Image.Image
    label: str


def encoder_pictures(image_processor: Any, pixel_values: Tensor, picture: Image.Image, count: int) -> list[Image.Image]:
    """What the encoder saw, one picture for each of `count` partitions.

    Read back from the processor's tensor where it holds pictures; families that cut them into patches first (Qwen's)
    see the whole picture, squeezed to their grid.
    """
    if pixel_values.dim() < 4 or pixel_values.shape[-3] != 3:
        return [picture] * count
    tiles = pixel_values.reshape(-1, *pixel_values.shape[-3:])[:count].float()
    if getattr(image_processor, "do_normalize", True):
        mean, spread = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
        tiles = tiles * spread[:, None, None] + mean[:, None, None]
    colours = (rearrange(tiles, "tile channel height width -> tile height width channel") * 255).round()
    return [Image.fromarray(tile.numpy()) for tile in colours.clamp(0, 255).to(torch.uint8)]


def draw_layouts(
    layouts: Sequence[Layout], cells: Sequence[Bool[Tensor, "partitions cells"]], pictures: Sequence[Image.Image]
) -> Image.Image:
    """All partitions of an image: the whole image beside the mosaic of its tiles, or what there is in rows.

    layouts, cells: as a report's details hold them.  pictures: one for each partition of all layouts, in order.
    Raises ValueError if their number is another.
    """
    expected = sum(layout.partitions for layout in layouts)
    if len(pictures) != expected:
        raise ValueError(f"the layouts have {expected} partitions, one picture each; got {len(pictures)} pictures")
    tiles = layouts[0].tiles if len(layouts) == 1 else None
    side = SIDE if expected == 1 else SIDE // max(tiles or (2, 2))
    drawn: list[Image.Image] = []
    for layout, keep in zip(layouts, cells, strict=True):
        for partition in range(layout.partitions):
            whole = tiles is not None and partition == 0
            drawn.append(
                draw_cells(
                    pictures[len(drawn)],
                    keep[partition].view(layout.height, layout.width),
                    layout.valid()[partition].view(layout.height, layout.width),
                    SIDE if whole else side,
                )
            )
    if tiles is not None:
        return in_rows([drawn[0], in_rows(drawn[1:], tiles[1], gap=2)], columns=2)
    return in_rows(drawn, columns=math.isqrt(expected - 1) + 1, gap=2)


def draw_cells(
    picture: Image.Image,
    keep: Bool[Tensor, "height width"],
    valid: Bool[Tensor, "height width"] | None = None,
    side: int = SIDE,
) -> Image.Image:
    """One partition, about `side` pixels long: kept cells bright, dropped ones dim, under a thin grid."""
    height, width = keep.shape
    cell = max(4, round(side / max(height, width)))
    size = (width * cell, height * cell)
    bright = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    drawn = Image.composite(bright, bright.point(lambda value: value * DIM), _mask(keep, size))
    if valid is not None:
        drawn.paste((0, 0, 0), mask=_mask(~valid, size))
    pen = ImageDraw.Draw(drawn)
    for column in range(1, width):
        pen.line([(column * cell, 0), (column * cell, size[1])], fill=GRID)
    for row in range(1, height):
        pen.line([(0, row * cell), (size[0], row * cell)], fill=GRID)
    outlined = keep if valid is None or not torch.equal(keep, valid) else torch.zeros_like(keep)
    for row, column in outlined.nonzero().tolist():
        pen.rectangle([column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1], outline=OUTLINE)
    return drawn


def _mask(cells: Bool[Tensor, "height width"], size: tuple[int, int]) -> Image.Image:
    small = Image.fromarray(cells.cpu().to(torch.uint8).mul(255).numpy())
    return small.resize(size, Image.Resampling.NEAREST)


def in_rows(pictures: Sequence[Image.Image], columns: int, gap: int = GAP) -> Image.Image:
    """Pictures of one size or several, in rows of `columns`, each in a cell as large as the largest."""
    width, height = max(one.width for one in pictures), max(one.height for one in pictures)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), PAPER)
    for place, one in enumerate(pictures):
        sheet.paste(one, (place % columns * (width + gap), place // columns * (height + gap)))
    return sheet


def sheet(title: str, panels: Sequence[Panel]) -> Image.Image:
    """Panels side by side, as many in a row as `WIDTH` allows, each over its label, under a title."""
    font, small = ImageFont.load_default(size=18), ImageFont.load_default(size=15)
    height = max(panel.picture.height for panel in panels)
    labelled = []
    for panel in panels:
        lines = panel.label.splitlines()
        card = Image.new("RGB", (max(panel.picture.width, 200), height + 8 + 20 * len(lines)), PAPER)
        card.paste(panel.picture, (0, 0))
        pen = ImageDraw.Draw(card)
        for number, line in enumerate(lines):
            pen.text((2, height + 6 + 20 * number), line, fill=INK, font=small)
        labelled.append(card)
    columns = max(1, WIDTH // (max(card.width for card in labelled) + 2 * GAP))
    rows = in_rows(labelled, min(columns, len(labelled)), gap=2 * GAP)
    page = Image.new("RGB", (rows.width + 2 * GAP, rows.height + 3 * GAP + 24), PAPER)
    ImageDraw.Draw(page).text((GAP + 2, GAP), title, fill=INK, font=font)
    page.paste(rows, (GAP, 2 * GAP + 24))
    return page


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets of any width below each other."""
    page = Image.new("RGB", (max(one.width for one in sheets), sum(one.height for one in sheets)), PAPER)
    top = 0
    for one in sheets:
        page.paste(one, (0, top))
        top += one.height
    return page
