"""Families that make one token of a square of a picture's patches: SmolVLM, Idefics3, InternVL, Gemma 3, Mistral 3."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from vision_tokens.families.facts import Inputs, grid_of, raster
from vision_tokens.layout import Layout


def _squares(rows: list[Tensor], tokens: int, patches: int) -> Tensor:
    """Attention of patches to that of tokens: the mean over each token's square of patches.

    rows: [pictures, heads, patches * patches].  tokens, patches: along a picture's side.
    """
    factor = patches // tokens
    return reduce(
        torch.cat(rows),
        "pictures heads (rows a columns b) -> heads (pictures rows columns)",
        "mean",
        rows=tokens,
        a=factor,
        b=factor,
    )


# SmolVLM and Idefics3: every tile is a picture of its own between text tokens


def idefics_layouts(model: nn.Module, inputs: Inputs) -> list[tuple[Layout, Tensor]]:
    """The tiles of all images, without the empty ones that fill up a batch."""
    config: Any = model.config
    side = grid_of(config.vision_config) // config.scale_factor
    pixels = inputs["pixel_values"].flatten(0, 1)
    real = (pixels != 0).flatten(1).any(dim=-1)  # the model drops padding pictures, which are all zero,
    real[0] |= ~real.any()  # but leaves one
    return [(raster(1, side, side, pixels.device), tile) for tile in pixels[real]]


def idefics_saliency(model: nn.Module, inputs: Inputs, rows: list[Tensor]) -> Tensor:
    """See `_squares`."""
    config: Any = model.config
    patches = grid_of(config.vision_config)
    return _squares(rows, patches // int(config.scale_factor), patches)


# InternVL: the same with another shuffle


def internvl_layouts(model: nn.Module, inputs: Inputs) -> list[tuple[Layout, Tensor]]:
    """Every tile a picture; its tokens in the order in which the family's own shuffle, run over indices, puts them."""
    config: Any = model.config
    patches, tokens = _internvl_sides(config)
    factor = patches // tokens
    index = torch.arange(patches * patches).view(1, patches, patches, 1)
    corners = model.pixel_shuffle(index, scale_factor=config.downsample_ratio)[..., 0].flatten()  # type: ignore[operator]
    source = corners // patches // factor * tokens + corners % patches // factor
    pixels: Tensor = inputs["pixel_values"]
    return [(Layout(source.to(pixels.device), 1, tokens, tokens), tile) for tile in pixels]


def internvl_saliency(model: nn.Module, inputs: Inputs, rows: list[Tensor]) -> Tensor:
    """See `_squares`."""
    patches, tokens = _internvl_sides(model.config)
    return _squares(rows, tokens, patches)


def _internvl_sides(config: Any) -> tuple[int, int]:
    """Patches and tokens along a tile's side."""
    patches = int(config.vision_config.image_size[0]) // int(config.vision_config.patch_size[0])
    return patches, int(patches * config.downsample_ratio)


# Gemma 3: squares are averaged


def gemma_layouts(model: nn.Module, inputs: Inputs) -> list[tuple[Layout, Tensor]]:
    """One picture an image, or a crop of one."""
    side = math.isqrt(int(model.config.mm_tokens_per_image))  # type: ignore[union-attr, arg-type]
    pixels: Tensor = inputs["pixel_values"]
    return [(raster(1, side, side, pixels.device), own) for own in pixels]


def gemma_saliency(model: nn.Module, inputs: Inputs, rows: list[Tensor]) -> Tensor:
    """See `_squares`."""
    config: Any = model.config
    return _squares(rows, math.isqrt(int(config.mm_tokens_per_image)), grid_of(config.vision_config))


# Mistral 3: images of any size, as one row of patches


def mistral_layouts(model: nn.Module, inputs: Inputs) -> list[tuple[Layout, Tensor]]:
    """One picture an image, on a grid of its own."""
    side = int(model.config.vision_config.patch_size * model.config.spatial_merge_size)  # type: ignore[union-attr, operator]
    sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
    return [
        (raster(1, height // side, width // side, own.device), own[:, :height, :width])
        for (height, width), own in zip(sizes, inputs["pixel_values"], strict=True)
    ]


def mistral_saliency(model: nn.Module, inputs: Inputs, rows: list[Tensor]) -> Tensor:
    """The mean over each token's square of patches; patches beyond the last whole square reach no token."""
    config: Any = model.config
    patch, merge = int(config.vision_config.patch_size), int(config.spatial_merge_size)
    grids = [(height // patch, width // patch) for height, width in torch.as_tensor(inputs["image_sizes"]).tolist()]
    images = torch.cat(rows, dim=-1).squeeze(0).split_with_sizes([height * width for height, width in grids], dim=-1)
    pooled = []
    for (height, width), patches in zip(grids, images, strict=True):
        grid = patches.view(-1, height, width)[:, : height // merge * merge, : width // merge * merge]
        pooled.append(reduce(grid, "heads (rows a) (columns b) -> heads rows columns", "mean", a=merge, b=merge))
    return torch.cat([rearrange(grid, "heads rows columns -> heads (rows columns)") for grid in pooled], dim=-1)
