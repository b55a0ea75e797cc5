"""QueCC's compressor: a small trained network that makes a few visual tokens of many, with the question in view.

Source: Li et al., "Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters", ICLR 2025 (arXiv:2411.03312),
section 4, and its released code, whose names the parameters have.  No weights of it were released.  The method that
puts it into a model is `vision_tokens.quecc`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Self

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mmaccel.methods import Unsupported
from vision_tokens.weights import fill, tensors_under

HEADS = 8  # of the attention within a cell
FIRST = ("q_proj.0.weight", "k_proj.0.weight", "text_projection.0.weight", "q_downsample.weight")
"""The parameters that tell the sizes."""


class QueryCompressor(nn.Module):
    """A query for each cell of a coarse grid, made of the question and the cell, attends to the cell's own tokens.

    width: of the encoder's features; levels: the joint width of its features at several depths; text: of the language
    model's hidden states; kernel: how many tokens a cell is wide and high.
    """

    def __init__(self, width: int, levels: int, text: int, kernel: int) -> None:
        super().__init__()
        self.width, self.levels, self.text, self.kernel = width, levels, text, kernel
        self.text_projection = nn.Sequential(nn.Linear(text, width), nn.LayerNorm(width, eps=1e-6))
        self.q_proj, self.k_proj, self.v_proj = (mixer(given, width) for given in (width, levels, levels))
        self.q_downsample = nn.Conv2d(width, width, kernel, stride=kernel, groups=width)
        self.clip_attn = nn.MultiheadAttention(width, HEADS, batch_first=True)

    @classmethod
    def load(cls, file: Path | str) -> Self:
        """The compressor in a safetensors file with the release's names (`mm_projector.0.*`); all sizes are its own.

        Raises `Unsupported` for a file that holds none, or a part of one.
        """
        found = tensors_under("mm_projector.0.", file)
        if missing := [name for name in FIRST if name not in found]:
            raise Unsupported(f"{str(file)!r} holds no QueCC compressor: it lacks mm_projector.0.{missing[0]}")
        width, levels, text, kernel = (found[name].shape[-1] for name in FIRST)
        if width % HEADS:
            raise Unsupported(
                f"{str(file)!r} holds a QueCC compressor {width} wide, which its {HEADS} heads cannot share equally"
            )
        compressor = cls(width, levels, text, kernel)
        fill(compressor, found, "QueCC compressor", file)
        return compressor

    def forward(
        self,
        features: Float[Tensor, "batch cells width"],
        levels: Float[Tensor, "batch cells levels"],
        question: Float[Tensor, "batch text"],
    ) -> Float[Tensor, "batch kept width"]:
        """The tokens in raster order, (side / kernel)^2 of the side^2 that came.

        features: what the projector would get.  levels: of the same cells, at several depths side by side (the release
        takes the hidden states 12, 16, 22 and 23 of 24).  question: the language model's last hidden state at the end
        of the question, read alone.  Raises ValueError unless cells tile the grid.
        """
        side = math.isqrt(features.shape[1])
        if side**2 != features.shape[1] or side % self.kernel:
            raise ValueError(
                f"cells of {self.kernel} x {self.kernel} tokens tile square grids whose side is a multiple of that; "
                f"got {features.shape[1]} tokens"
            )
        asked = features + self.text_projection(question)[:, None]
        plane = rearrange(self.q_proj(asked), "b (h w) d -> b d h w", h=side)
        query = rearrange(self.q_downsample(plane), "b d h w -> (b h w) 1 d")
        key, value = (
            rearrange(part, "b (h k w l) d -> (b h w) (k l) d", h=side // self.kernel, k=self.kernel, l=self.kernel)
            for part in (self.k_proj(levels), self.v_proj(levels))
        )
        found: Tensor = self.clip_attn(query, key, value, need_weights=False)[0]
        return rearrange(found, "(b kept) 1 d -> b kept d", b=len(features))


def mixer(given: int, width: int) -> nn.Sequential:
    """Two linear layers with a norm behind them."""
    return nn.Sequential(nn.Linear(given, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width, eps=1e-6))
