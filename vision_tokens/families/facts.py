"""What a family is described by: where a model's parts hang, and how its pictures become tokens of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_tokens.layout import Layout

Inputs = Mapping[str, Any]
"""The arguments of one `get_image_features` or `get_video_features` call, by name."""

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""The kinds of visual input, and the argument that each comes by."""


@dataclass(frozen=True)
class Packing:
    """How one kind of visual input becomes tokens of the prompt.

    layouts: for one call, per image or video, its layout and its part of the encoder's input.  A video's frames are
        its partitions.
    saliency: turns recorded attention, one [batch, heads, keys] tensor a call of the encoder layer, into
        [heads, cells], the cells of all pictures in the order of the layouts.
    projector: the module between encoder and language model, if it works token by token on [tiles, cells, channels]:
        methods that resample features then do so before it; None if the features are resampled behind it.
    """

    layouts: Callable[[nn.Module, Inputs], list[tuple[Layout, Tensor]]]
    saliency: Callable[[nn.Module, Inputs, list[Tensor]], Tensor]
    projector: str | None = None


@dataclass(frozen=True)
class Family:
    """What differs between families.

    text: the language model's attribute on the multimodal model.  tower: the vision encoder's.
    feature_layer: index of the encoder layer whose output the language model reads.
    image, video: how each kind of input is packed; video is None if the family reads none.
    grouped_positions: whether positions have more than one axis (M-RoPE).
    """

    text: str
    tower: str
    feature_layer: Callable[[nn.Module, int], int]
    image: Packing
    video: Packing | None = None
    grouped_positions: bool = False

    @property
    def packings(self) -> dict[str, Packing]:
        """By kind of input."""
        return {"image": self.image} | ({"video": self.video} if self.video else {})


def grid_of(config: Any) -> int:
    """Cells along one side of a square encoder's grid."""
    return int(config.image_size) // int(config.patch_size)


def raster(partitions: int, height: int, width: int, device: torch.device) -> Layout:
    """The layout of tokens that stand in raster order, partition after partition."""
    return Layout(torch.arange(partitions * height * width, device=device), partitions, height, width)


def last_layer(model: nn.Module, layers: int) -> int:
    """For encoders whose last layer is read."""
    return layers - 1
