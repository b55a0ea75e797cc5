"""The honest baselines: what any method has to beat at the same number of tokens."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmaccel.budgets import Budget, kept_count
from vision_tokens.hired import split_evenly
from vision_tokens.language_input import ResamplingMethod, SelectingMethod
from vision_tokens.layout import ImageView


@dataclass(frozen=True, kw_only=True)
class RandomTokens(SelectingMethod):
    """Keep visual tokens drawn at random, without replacement.

    The draw depends on the seed and the image's pixels alone, not on the batch that the image is in.
    """

    name: ClassVar[str] = "random"

    budget: Budget = 0.2
    seed: int = 0
    positions: Literal["kept", "packed"] = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"a seed is a whole number from 0 to 2**32 - 1; got {self.seed!r}")

    def select(self, view: ImageView) -> Bool[Tensor, "partitions cells"]:
        valid = view.layout.valid()
        content = b"" if view.pixels is None else view.pixels.detach().cpu().float().numpy().tobytes()
        generator = torch.Generator().manual_seed(zlib.crc32(content, self.seed))  # torch reads 32 bits of a seed
        chances = torch.rand(valid.shape, generator=generator).to(valid.device).masked_fill(~valid, -1).flatten()
        keep = torch.zeros_like(chances, dtype=torch.bool)
        keep[chances.topk(kept_count(self.budget, int(valid.sum()))).indices] = True
        return keep.view(valid.shape)


@dataclass(frozen=True, kw_only=True)
class UniformTokens(SelectingMethod):
    """Keep visual tokens at even distances in reading order, the same share of every tile."""

    name: ClassVar[str] = "uniform"

    budget: Budget = 0.2
    positions: Literal["kept", "packed"] = "kept"

    def select(self, view: ImageView) -> Bool[Tensor, "partitions cells"]:
        valid = view.layout.valid()
        have = valid.sum(dim=-1)
        keep = torch.zeros_like(valid)
        budgets = split_evenly(kept_count(self.budget, int(have.sum())), have)
        for partition, kept in enumerate(budgets.tolist()):
            cells = valid[partition].nonzero().squeeze(-1)
            keep[partition, cells[evenly_spaced(len(cells), kept).to(cells.device)]] = True
        return keep


def evenly_spaced(length: int, kept: int) -> Tensor:
    """The middles of `kept` equal intervals of 0 .. length - 1, as whole numbers: [kept], strictly ascending."""
    return ((torch.arange(kept) + 0.5) * length / max(kept, 1)).long()


@dataclass(frozen=True, kw_only=True)
class PooledTokens(ResamplingMethod):
    """Average the visual tokens over the cells of a smaller grid."""

    name: ClassVar[str] = "pooled"

    budget: Budget = 0.25
    positions: Literal["kept", "packed"] = "kept"

    def resample(
        self, features: Float[Tensor, "tiles height width channels"], size: tuple[int, int]
    ) -> Float[Tensor, "tiles small_height small_width channels"]:
        pooled = torch.nn.functional.adaptive_avg_pool2d(features.movedim(-1, 1).float(), size)
        return pooled.movedim(1, -1).to(features.dtype)
