"""LLaVA and its kin: a square encoder, whole or on tiles of a plane, and frames that are pooled."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vision_tokens.families.facts import Inputs, grid_of, raster
from vision_tokens.layout import Layout


def square_layouts(model: nn.Module, inputs: Inputs) -> list[tuple[Layout, Tensor]]:
    """One picture an image, its patches in raster order."""
    side = grid_of(model.config.vision_config)  # type: ignore[union-attr]
    pixels: Tensor = inputs["pixel_values"]
    return [(raster(1, side, side, pixels.device), own) for own in pixels]


def square_saliency(model: nn.Module, inputs: Inputs, rows: list[Tensor]) -> Tensor:
    """A token's attention is its patch's."""
    return rearrange(torch.cat(rows), "pictures heads cells -> heads (pictures cells)")


def feature_layer(model: nn.Module, layers: int) -> int:
    """The layer that the configuration names; of several, the last."""
    chosen = model.config.vision_feature_layer  # type: ignore[union-attr]
    chosen = int(chosen if isinstance(chosen, int) else chosen[-1])  # type: ignore[index]
    return (chosen if chosen >= 0 else layers + 1 + chosen) - 1  # hidden state k is the output of layer k - 1


def sequence_layouts(model: nn.Module, inputs: Inputs) -> list[tuple[Layout, Tensor]]:
    """FastVLM: a convolutional encoder, so that only the configuration says how many tokens an image has."""
    side = math.isqrt(int(model.config.image_seq_length))  # type: ignore[union-attr, arg-type]
    pixels: Tensor = inputs["pixel_values"]
    return [(raster(1, side, side, pixels.device), own) for own in pixels]


# LLaVA-NeXT: the whole image, then tiles on a plane that is un-padded and gets a newline token a row


def tiled_layouts(model: nn.Module, inputs: Inputs) -> list[tuple[Layout, Tensor]]:
    """The family's own packing, run over the indices of cells."""
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
        image_size_to_num_patches,
    )

    config: Any = model.config
    size, side = config.vision_config.image_size, grid_of(config.vision_config)
    pixels: Tensor = inputs["pixel_values"]
    layouts, first = [], 0
    for index, image_size in enumerate(inputs["image_sizes"]):
        partitions = image_size_to_num_patches(image_size, config.image_grid_pinpoints, size)
        cells = torch.arange(partitions * side * side, device=pixels.device).view(partitions, side * side, 1)
        packed, _ = model.pack_image_features(  # type: ignore[operator]
            [cells],
            [image_size],
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_newline=cells.new_tensor([-1]),
        )
        tiles = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, size)
        own = pixels[index][:partitions] if pixels.dim() == 5 else pixels[first : first + partitions]
        layouts.append((Layout(packed[0].squeeze(-1), partitions, side, side, (int(tiles[0]), int(tiles[1]))), own))
        first += partitions
    return layouts


# LLaVA-OneVision: the same, but a large plane is interpolated to a smaller one, and one of several images has no tiles


def blended_layouts(model: nn.Module, inputs: Inputs) -> list[tuple[Layout, Tensor]]:
    """The family's own packing, run over places: a token of an interpolated plane comes from the cell under its middle.

    Each cell carries its partition, or its place on the plane of tiles as (1, row, column); interpolation is linear in
    both, so what comes out are places again.
    """
    from transformers.models.llava_onevision.modeling_llava_onevision import (
        get_anyres_image_grid_shape,
        image_size_to_num_patches,
    )

    config: Any = model.config
    size, side = config.vision_config.image_size, grid_of(config.vision_config)
    pixels: Tensor = inputs["pixel_values"]
    sizes = inputs["image_sizes"]
    together = inputs.get("batch_num_images")
    alone = [True] * len(sizes) if together is None else [count == 1 for count in together for _ in range(count)]
    layouts, first = [], 0
    for index, (image_size, tiled) in enumerate(zip(sizes, alone, strict=True)):
        partitions = image_size_to_num_patches(image_size, config.image_grid_pinpoints, size) if tiled else 1
        tiles = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, size) if tiled else None
        columns = int(tiles[1]) if tiles else 1
        row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([torch.zeros_like(row), row, column], dim=-1)[None].repeat(partitions, 1, 1, 1)
        for tile in range(partitions - 1):
            places[tile + 1] += torch.tensor([1, tile // columns * side, tile % columns * side])
        (packed,), _ = model.pack_image_features(  # type: ignore[operator]
            [places.flatten(1, 2).to(pixels.device, torch.float32)],
            [image_size],
            image_newline=torch.full((3,), -1.0, device=pixels.device),
            vision_aspect_ratio=inputs.get("vision_aspect_ratio") or config.vision_aspect_ratio,
        )
        on_plane, row, column = packed.round().long().unbind(-1)
        partition = torch.where(on_plane == 1, 1 + row // side * columns + column // side, 0)
        source = torch.where(on_plane < 0, -1, (partition * side + row % side) * side + column % side)
        own = pixels[index][:partitions] if pixels.dim() == 5 else pixels[first : first + partitions]
        shape = (int(tiles[0]), columns) if tiles else None
        blended = not torch.equal(packed, packed.round())
        layouts.append((Layout(source, partitions, side, side, shape, blended), own))
        first += partitions
    return layouts


def halved_frames_layouts(model: nn.Module, inputs: Inputs) -> list[tuple[Layout, Tensor]]:
    """LLaVA-OneVision's videos: frames of half the grid's side, and one newline token behind the last."""
    side = math.ceil(grid_of(model.config.vision_config) / 2)  # type: ignore[union-attr]
    videos: Tensor = inputs["pixel_values_videos"]
    frames = videos.shape[1]
    source = torch.cat([torch.arange(frames * side * side), torch.tensor([-1])]).to(videos.device)
    return [(Layout(source, frames, side, side), own) for own in videos]


def halved_frames_saliency(model: nn.Module, inputs: Inputs, rows: list[Tensor]) -> Tensor:
    """Attention of patches to that of tokens, by the very pooling that makes tokens of patches."""
    pooled = model.apply_pooling(rearrange(torch.cat(rows), "frames heads cells -> frames cells heads"))  # type: ignore[operator]
    return torch.as_tensor(rearrange(pooled, "frames cells heads -> heads (frames cells)"))


# LLaVA-NeXT-Video: frames pooled by a stride


def pooled_frames_layouts(model: nn.Module, inputs: Inputs) -> list[tuple[Layout, Tensor]]:
    """Each frame a partition of its own; no newline tokens."""
    config: Any = model.config
    side = grid_of(config.vision_config) // config.spatial_pool_stride
    videos: Tensor = inputs["pixel_values_videos"]
    return [(raster(videos.shape[1], side, side, videos.device), own) for own in videos]


def pooled_frames_saliency(model: nn.Module, inputs: Inputs, rows: list[Tensor]) -> Tensor:
    """Attention of patches to that of tokens: the mean over the square of patches that is pooled into one."""
    config: Any = model.config
    squares = rearrange(torch.cat(rows), "f heads (h w) -> f heads h w", h=grid_of(config.vision_config))
    pooled = torch.nn.functional.avg_pool2d(squares, config.spatial_pool_stride)
    return rearrange(pooled, "frames heads height width -> heads (frames height width)")
