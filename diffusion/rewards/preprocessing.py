"""What an image processor does, on tensors: resize, crop, normalise, in batches and on the images' device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

_FILTERS = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}  # PIL's numbers


@dataclass(frozen=True)
class Preprocessing:
    """Resizing, a crop of the middle, and normalisation.

    size: the shorter side, or (height, width), in pixels; None keeps the size.
    Pillow, which processors call, rounds to whole levels after each of its two passes; this does not, and agrees to two
    levels of 255.  Only where a pass overshoots black or white may more differ, in pictures that are not square: which
    pass comes first then matters, and Pillow's choice depends on the sizes.
    """

    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Float[Tensor, "rows 3 height width"]) -> Float[Tensor, "rows 3 new_height new_width"]:
        if self.size is not None:
            images = _resized(images, *self._new_size(*images.shape[-2:]), self.interpolation)
        if self.crop is not None:
            top, left = ((side - kept) // 2 for side, kept in zip(images.shape[-2:], self.crop, strict=True))
            images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (rearrange(images.new_tensor(v), "channel -> channel 1 1") for v in (self.mean, self.std))
        return (images - mean) / std

    def _new_size(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        assert self.size is not None
        short, long = self.size, int(self.size * max(height, width) / min(height, width))
        return (short, long) if height <= width else (long, short)

    @classmethod
    def of(cls, processor: Any) -> Preprocessing:
        """What a transformers image processor does.  Raises ValueError for what is not known here."""

        def setting(name: str, default: Any = None) -> Any:
            return getattr(processor, name, default)

        size = _side(setting("size")) if setting("do_resize") else None
        crop = _side(setting("crop_size")) if setting("do_center_crop") else None
        crop = (crop, crop) if isinstance(crop, int) else crop
        normalises = setting("do_normalize")
        smallest = min(size) if isinstance(size, tuple) else size
        if (
            (setting("do_resize") and (size is None or setting("resample") not in _FILTERS))
            or (setting("do_center_crop") and (crop is None or smallest is None or max(crop) > smallest))
            or not setting("do_rescale", True)
            or abs(255 * setting("rescale_factor", 1 / 255) - 1) > 1e-6
            or setting("do_pad")
        ):
            raise ValueError(
                f"the image processor {type(processor).__name__} does what is not supported here. Supported: a resize "
                "to a shortest_edge or to a height and width, bilinear or bicubic; a crop of the middle no larger than "
                "that; rescaling by 1/255; normalisation"
            )
        return cls(
            size,
            crop,
            _FILTERS[setting("resample")] if size is not None else "bicubic",
            tuple(setting("image_mean")) if normalises else (0.0,) * 3,
            tuple(setting("image_std")) if normalises else (1.0,) * 3,
        )


def _side(size: Any) -> int | tuple[int, int] | None:
    """The shorter side, or (height, width), that a processor's setting gives; None for another kind of size."""
    sides = dict(size or {})
    if sides.get("height") and sides.get("width"):
        return int(sides["height"]), int(sides["width"])
    return int(sides["shortest_edge"]) if sides.get("shortest_edge") and not sides.get("longest_edge") else None


def _resized(images: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Antialiased, columns before rows, as Pillow mostly does; each clipped to 0..1, as its bytes are."""
    if width != images.shape[-1]:
        images = functional.interpolate(images, (images.shape[-2], width), mode=mode, antialias=True).clamp(0, 1)
    if height != images.shape[-2]:
        images = functional.interpolate(images, (height, width), mode=mode, antialias=True).clamp(0, 1)
    return images


def to_bytes(images: Float[Tensor, "*rows 3 height width"]) -> NDArray[np.uint8]:
    """The pictures as a file holds them: uint8 [..., height, width, 3], rounded to the nearest level."""
    levels = (images * 255).round().clamp(0, 255).to(torch.uint8)
    pictures = rearrange(levels, "... channel height width -> ... height width channel")
    return np.asarray(pictures.cpu(), dtype=np.uint8)
