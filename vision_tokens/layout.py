"""What a method sees of one image: where its tokens come from, what the encoder looked at, and its pixels.

A *partition* is one picture that went through the encoder on its own: the whole image, a tile of it, or a frame of a
video.  A *cell* is a
place on a partition's grid of `height` x `width` tokens, in raster order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where each of an image's tokens, as the language model reads them, comes from; or a video's.

    source: the flat cell index, partition * height * width + cell, of every token in the order of the prompt; -1 for a
        newline token.  Cells that un-padding threw away do not occur.
    tiles: rows and columns of tiles, if partition 0 is the whole image and the others are its tiles; else None.
    blended: whether tokens do not stand for whole cells of equal tiles: they are interpolated between cells, and each
        comes from the cell under its middle, or their partitions have grids of different sizes.
    seats: where the encoder itself merged tokens, one cell for each that is left; None if every cell has its own.
    """

    source: Int[Tensor, " tokens"]
    partitions: int
    height: int
    width: int
    tiles: tuple[int, int] | None = None
    blended: bool = False
    seats: Bool[Tensor, "partitions cells"] | None = None

    @property
    def cells(self) -> int:
        """Cells of one partition."""
        return self.height * self.width

    def valid(self) -> Bool[Tensor, "partitions cells"]:
        """The cells that reach the language model with a token of their own."""
        return self.reached() if self.seats is None else self.reached() & self.seats

    def reached(self) -> Bool[Tensor, "partitions cells"]:
        """The cells that reach the language model."""
        mask = torch.zeros(self.partitions * self.cells, dtype=torch.bool, device=self.source.device)
        mask[self.source[self.source >= 0]] = True
        return mask.view(self.partitions, self.cells)

    def tokens_of(self, keep: Bool[Tensor, "partitions cells"]) -> Bool[Tensor, " tokens"]:
        """Which tokens stay when these cells stay; a newline token stays when its row keeps a token."""
        content = self.source >= 0
        kept = torch.where(content, keep.flatten()[self.source.clamp(min=0)], False)
        if bool(content.all()):
            return kept
        lines = self._lines()
        line_kept = torch.zeros(int(lines.max()) + 1, dtype=torch.bool, device=kept.device)
        line_kept[lines[kept]] = True
        return kept | (~content & line_kept[lines])

    def merged(self, into: Int[Tensor, "partitions cells"]) -> Layout:
        """The layout once cells with the same number in `into` are one token, on the first that reaches the model."""
        reached = self.reached()
        cells = torch.arange(self.cells, device=into.device).expand(into.shape)
        first = torch.full_like(into, self.cells)
        first.scatter_reduce_(1, into, torch.where(reached, cells, self.cells), "amin")
        return dataclasses.replace(self, seats=reached & (first.gather(1, into) == cells))

    def _lines(self) -> Int[Tensor, " tokens"]:
        """The number of the printed line that each token stands on; a newline token ends its line.

        Without tiles a line is all that stands before its newline token: a picture, or the frames of a video.
        """
        newline = self.source < 0
        if self.tiles is None:
            return newline.long().cumsum(dim=0) - newline.long()
        cell = self.source.clamp(min=0)
        partition, row = cell // self.cells, cell % self.cells // self.width
        tile = (partition - 1).clamp(min=0)
        plane_row = torch.where(partition > 0, self.height + tile // self.tiles[1] * self.height + row, row)
        plane_row = torch.where(newline, plane_row.roll(1), plane_row)
        if len(plane_row) and bool((plane_row.diff() < 0).any()):
            raise ValueError("the packed tokens of an image are not in reading order; this layout is not supported")
        return plane_row


@dataclass(frozen=True)
class ImageView:
    """One image, as a method's `select` sees it.

    attention: by name ("first": the encoder's first layer, "feature": the layer whose output the language model
        reads, "last": its last layer), the attention that each cell gets: from the class token, per head, if the
        encoder has one, else the mean over all queries.
    keys: by the same names, each cell's key, averaged over the heads, and over its patches if it holds several.
    pixels: the encoder's input for this image, whatever its shape; a source of per-image randomness.
    """

    layout: Layout
    attention: Mapping[str, Float[Tensor, "partitions heads cells"]] = field(default_factory=dict)
    keys: Mapping[str, Float[Tensor, "partitions cells width"]] = field(default_factory=dict)
    pixels: Tensor | None = None


class Merged(NamedTuple):
    """What a merging method makes of an image.

    seats: the cells that stay.  features: what is put on them, in the order of partitions and cells.
    """

    seats: Bool[Tensor, "partitions cells"]
    features: Float[Tensor, "seats channels"]
