"""Qwen2-VL and its kin: images and videos of any size as one row of patches, merged in squares."""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import reduce
from torch import Tensor, nn

from vision_tokens.families.facts import PIXELS, Inputs, Packing, raster
from vision_tokens.layout import Layout

Kind = Literal["image", "video"]


def packing(kind: Kind, windows: bool = False) -> Packing:
    """The packing of images or of videos.  windows: whether the encoder holds its patches in window order inside."""

    def layouts(model: nn.Module, inputs: Inputs) -> list[tuple[Layout, Tensor]]:
        merge = int(model.config.vision_config.spatial_merge_size)  # type: ignore[union-attr, arg-type]
        grids: list[list[int]] = inputs[f"{kind}_grid_thw"].tolist()
        patches = inputs[PIXELS[kind]].split([frames * height * width for frames, height, width in grids])
        return [
            (raster(frames, height // merge, width // merge, own.device), own)
            for (frames, height, width), own in zip(grids, patches, strict=True)
        ]

    def saliency(model: nn.Module, inputs: Inputs, rows: list[Tensor]) -> Tensor:
        """Attention of patches to that of merged tokens in raster order: the mean over a token's patches."""
        vision: Any = model.config.vision_config  # type: ignore[union-attr]
        merged = reduce(
            torch.cat(rows, dim=-1).squeeze(0),
            "heads (tokens patches) -> heads tokens",
            "mean",
            patches=vision.spatial_merge_size**2,
        )
        return _out_of_windows(merged, inputs[f"{kind}_grid_thw"], vision) if windows else merged

    return Packing(layouts, saliency)


def _out_of_windows(merged: Tensor, grids: Tensor, vision: Any) -> Tensor:
    from transformers.vision_utils import get_vision_window_index

    window_index, _ = get_vision_window_index(grids, vision.spatial_merge_size, vision.window_size, vision.patch_size)
    return torch.index_select(merged, 1, window_index.to(merged.device).argsort())


def last_full_layer(model: nn.Module, layers: int) -> int:
    """Qwen2.5-VL: the last layer that looks beyond its windows."""
    return int(max(model.config.vision_config.fullatt_block_indexes))  # type: ignore[union-attr, arg-type]
