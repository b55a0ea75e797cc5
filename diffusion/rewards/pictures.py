"""Rewards that need no model: how a picture looks, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import ClassVar

import numpy as np
from einops import rearrange
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffusion.rewards.inputs import ImageReward
from diffusion.rewards.preprocessing import to_bytes


@dataclass(frozen=True, kw_only=True)
class JpegCompressibility(ImageReward):
    """How small a picture's JPEG file is: minus its kilobytes (1000 bytes).

    Range below 0.  quality: of the JPEG, 1 to 95.  incompressible: the other sign, kilobytes, to reward detail.
    Source: Black et al. 2023, DDPO (arXiv:2305.13301), section 5.1; quality 95 as in its code.
    """

    name: ClassVar[str] = "jpeg-compressibility"

    quality: int = 95
    incompressible: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.quality, bool) or not isinstance(self.quality, int) or not 1 <= self.quality <= 95:
            raise ValueError(f"the quality of a JPEG is a whole number from 1 to 95; got {self.quality!r}")

    def score(
        self, images: Float[Tensor, "rows 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        sign = 1 if self.incompressible else -1
        return images.new_tensor([sign * _jpeg_bytes(picture, self.quality) / 1000 for picture in to_bytes(images)])


@dataclass(frozen=True, kw_only=True)
class Brightness(ImageReward):
    """How bright a picture is: the mean of its luma.  Range 0 (black) to 1 (white)."""

    name: ClassVar[str] = "brightness"

    def score(
        self, images: Float[Tensor, "rows 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        return luma(images).mean(dim=(-2, -1))


@dataclass(frozen=True, kw_only=True)
class Contrast(ImageReward):
    """How much light and dark differ: the standard deviation of the luma over all pixels.

    Range 0 (one tone) to 0.5 (half black, half white).  Source: Peli 1990, root-mean-square contrast.
    """

    name: ClassVar[str] = "contrast"

    def score(
        self, images: Float[Tensor, "rows 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        return luma(images).flatten(1).std(dim=1, correction=0)


@dataclass(frozen=True, kw_only=True)
class Colourfulness(ImageReward):
    """How colourful a picture is, on the paper's scale: 0 not, 33 moderately, 59 quite, 109 extremely.

    Range from 0; levels of 255.
    Source: Hasler and Suesstrunk 2003, "Measuring colourfulness in natural images", M^(3).
    """

    name: ClassVar[str] = "colourfulness"

    def score(
        self, images: Float[Tensor, "rows 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        red, green, blue = rearrange(255 * images, "rows channel height width -> rows channel (height width)").unbind(1)
        red_green, yellow_blue = red - green, (red + green) / 2 - blue
        spread = red_green.var(dim=1, correction=0) + yellow_blue.var(dim=1, correction=0)
        mean = red_green.mean(dim=1).square() + yellow_blue.mean(dim=1).square()
        return spread.sqrt() + 0.3 * mean.sqrt()


def luma(images: Float[Tensor, "*rows 3 height width"]) -> Float[Tensor, "*rows height width"]:
    """ITU-R BT.601 luma, in 0..1."""
    red, green, blue = images.unbind(dim=-3)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _jpeg_bytes(picture: NDArray[np.uint8], quality: int) -> int:
    file = BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=quality)
    return file.tell()
