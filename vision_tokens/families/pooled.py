"""Molmo 2: tokens pool patches of overlapping crops, and the processor says which."""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from vision_tokens.families.facts import PIXELS, Inputs, Packing
from vision_tokens.layout import Layout


def packing(kind: Literal["image", "video"]) -> Packing:
    """An image has a coarse grid of tokens and, behind it, a fine one; a video has one grid a frame.

    Both grids of an image are laid into partitions of one size, whose other cells reach no token.
    """

    def layouts(model: nn.Module, inputs: Inputs) -> list[tuple[Layout, Tensor]]:
        patches = inputs[PIXELS[kind]].flatten(0, -2)
        grids = [_grids(row) for row in inputs[f"{kind}_grids"].tolist()]
        of_images = _of_images(inputs, kind, grids)
        return [
            (_layout(shapes, patches.device), patches[torch.unique(pooled[pooled >= 0])])
            for shapes, pooled in zip(grids, of_images, strict=True)
        ]

    def saliency(model: nn.Module, inputs: Inputs, rows: list[Tensor]) -> Tensor:
        """Attention of patches to that of cells: the mean over a token's patches, zero where no token is."""
        patches = rearrange(torch.cat(rows), "crops heads patches -> heads (crops patches)")
        grids = [_grids(row) for row in inputs[f"{kind}_grids"].tolist()]
        cells = []
        for shapes, pooled in zip(grids, _of_images(inputs, kind, grids), strict=True):
            layout, there = _layout(shapes, patches.device), pooled >= 0
            values = (patches[:, pooled.clamp(min=0)] * there).sum(dim=-1) / there.sum(dim=-1)
            own = patches.new_zeros(len(patches), layout.partitions * layout.cells)
            cells.append(own.index_copy(1, layout.source, values.to(own.dtype)))
        return torch.cat(cells, dim=-1)

    def _grids(row: list[int]) -> list[tuple[int, int]]:
        """Height and width of each partition, in the order of the tokens."""
        if kind == "video":
            frames, height, width = row
            return [(height, width)] * frames
        return [grid for grid in ((row[0], row[1]), (row[2], row[3])) if all(grid)]

    return Packing(layouts, saliency)


def _of_images(inputs: Inputs, kind: str, grids: list[list[tuple[int, int]]]) -> tuple[Tensor, ...]:
    """For each image, the patches that each of its tokens pools, -1 where there are fewer."""
    pooling: Tensor = inputs[f"{kind}_token_pooling"]
    pooling = pooling[(pooling >= 0).any(dim=-1)]
    return pooling.split_with_sizes([sum(height * width for height, width in shapes) for shapes in grids])


def _layout(shapes: list[tuple[int, int]], device: torch.device) -> Layout:
    tallest, widest = (max(side) for side in zip(*shapes, strict=True))
    plane = torch.arange(len(shapes) * tallest * widest, device=device).view(len(shapes), tallest, widest)
    source = torch.cat([own[:height, :width].flatten() for own, (height, width) in zip(plane, shapes, strict=True)])
    unequal = len(set(shapes)) > 1
    return Layout(source, len(shapes), tallest, widest, (1, 1) if unequal else None, blended=unequal)


def feature_layer(model: nn.Module, layers: int) -> int:
    """The deepest of the layers that are read."""
    config: Any = model.config
    return int(max(layer if layer >= 0 else layers + layer for layer in config.adapter_config.vision_feature_layer))
