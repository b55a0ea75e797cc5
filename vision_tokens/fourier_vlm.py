"""Fourier-VLM: keep the low two-dimensional frequencies of the visual tokens.

Source: "Fourier-VLM: Compressing Vision Tokens in the Frequency Domain for Large Vision-Language Models"
(arXiv:2508.06038).  The paper fine-tunes models with the compressor in place; dropping it into an untouched model is
our use of it, for which the gain has to be mended (see `gain`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmaccel.budgets import Budget
from vision_tokens.language_input import ResamplingMethod


@dataclass(frozen=True, kw_only=True)
class FourierVLM(ResamplingMethod):
    """Resample each tile's grid of visual tokens to a smaller one that carries its low frequencies.

    budget: fraction of the tokens, or their number per image; each tile gets the largest grid within it.
    gain: "mean-preserving" keeps the mean of every channel, for models that were not trained with the compressor;
        "paper" is the orthonormal transform, which multiplies it by sqrt(HW / hw), for models that were.
    """

    name: ClassVar[str] = "fourier-vlm"

    budget: Budget = 0.25
    gain: Literal["mean-preserving", "paper"] = "mean-preserving"
    positions: Literal["kept", "packed"] = "kept"

    def resample(
        self, features: Float[Tensor, "tiles height width channels"], size: tuple[int, int]
    ) -> Float[Tensor, "tiles small_height small_width channels"]:
        return low_frequencies(features, size, self.gain)


def low_frequencies(
    features: Float[Tensor, "*batch height width channels"],
    size: tuple[int, int],
    gain: Literal["mean-preserving", "paper"] = "mean-preserving",
) -> Float[Tensor, "*batch small_height small_width channels"]:
    """The orthonormal two-dimensional DCT of the grid, cropped to its low-frequency corner and transformed back.

    Computed in float32 and returned in the dtype that came.  DCT, crop and inverse are one separable linear map, two
    small matrices, which at the sizes of visual grids take less time than an FFT.  With gain "mean-preserving" a
    constant grid stays constant.
    """
    height, width = features.shape[-3:-1]
    rows = low_pass(height, size[0]).to(features.device)
    columns = low_pass(width, size[1]).to(features.device)
    if gain == "mean-preserving":
        rows, columns = rows * math.sqrt(size[0] / height), columns * math.sqrt(size[1] / width)
    wide = features.float()
    small = torch.einsum("sh,...hwc->...swc", rows, wide)
    return torch.einsum("tw,...swc->...stc", columns, small).to(features.dtype)


@lru_cache(maxsize=256)
def low_pass(length: int, kept: int) -> Float[Tensor, "kept length"]:
    """The matrix that takes `length` samples to `kept` samples with the same lowest `kept` DCT coefficients."""
    with torch.inference_mode(False):  # the matrix outlives the block that first asks for it
        return (dct_matrix(kept).mT @ dct_matrix(length)[:kept]).float()


def dct_matrix(length: int) -> Float[Tensor, "length length"]:
    """The orthonormal DCT-II: row k is a_k cos(pi (2j + 1) k / 2n), a_0 = sqrt(1/n), else sqrt(2/n); in float64."""
    frequency = torch.arange(length, dtype=torch.float64)[:, None]
    sample = torch.arange(length, dtype=torch.float64)[None, :]
    matrix = torch.cos(math.pi * (2 * sample + 1) * frequency / (2 * length)) * math.sqrt(2 / length)
    matrix[0] /= math.sqrt(2)
    return matrix
