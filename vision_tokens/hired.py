"""HiRED: attention-guided dropping of visual tokens under one budget for a tiled, high-resolution image.

Source: Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution
Vision-Language Models", AAAI 2025 (arXiv:2408.10945), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmaccel.budgets import Budget, kept_count
from vision_tokens.language_input import SelectingMethod
from vision_tokens.layout import ImageView


@dataclass(frozen=True, kw_only=True)
class HiRED(SelectingMethod):
    """Keep the visual tokens that the encoder's class token attends to, with a budget split over the tiles.

    budget: fraction of an image's tokens kept, in (0, 1], or their number.
    alpha: share of the budget that goes to the whole image, in [0, 1]; the rest goes to its tiles.
    split: how the tiles share: "rectangles" sums the first layer's attention over the part of the image under each
        tile (the paper) and hands out what rounding and full tiles leave over; "strips" counts the most attended
        tokens in contiguous runs of the flat token list and leaves the remainder unused (the released code).
    An encoder without a class token (SigLIP, Qwen's) is scored by the mean attention that a token gets from all others.
    Of tokens with equal scores the earlier one is kept.
    """

    name: ClassVar[str] = "hired"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llava-next-20": {"budget": 0.2},
        "llava-next-40": {"budget": 0.4},
        "released-code": {"split": "strips"},
    }
    attention: ClassVar[tuple[str, ...]] = ("first", "feature")

    budget: Budget = 0.2
    alpha: float = 0.5
    split: Literal["rectangles", "strips"] = "rectangles"
    positions: Literal["kept", "packed"] = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(
                f"alpha, the whole image's share of the budget, lies in [0, 1]; got {self.alpha!r}. The paper's is 0.5"
            )

    def select(self, view: ImageView) -> Bool[Tensor, "partitions cells"]:
        layout, valid = view.layout, view.layout.valid()
        if self.split == "strips":
            valid = torch.ones_like(valid)  # the released code also spends budget on padding, which is then cut away
        scores = view.attention["feature"].sum(dim=1).masked_fill(~valid, -torch.inf)
        total = kept_count(self.budget, int(valid.sum()))
        if layout.tiles is None:
            budgets = split_evenly(total, valid.sum(dim=-1))
        else:
            first = view.attention["first"][0].sum(dim=0)
            budgets = split_budget(
                first, valid.sum(dim=-1), total, self.alpha, layout.tiles, (layout.height, layout.width), self.split
            )
        return keep_best(scores, budgets) & layout.valid()


def keep_best(
    scores: Float[Tensor, "partitions cells"], budgets: Int[Tensor, " partitions"]
) -> Bool[Tensor, "partitions cells"]:
    """Marks, in each partition, as many of the highest scores as its budget says.  Step 5 of the method."""
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < budgets[:, None]


def split_budget(
    first_attention: Float[Tensor, " cells"],
    capacity: Int[Tensor, " partitions"],
    total: int,
    alpha: float,
    tiles: tuple[int, int],
    grid: tuple[int, int],
    split: Literal["rectangles", "strips"] = "rectangles",
) -> Int[Tensor, " partitions"]:
    """How many tokens each partition keeps: the whole image first, then its tiles in raster order.

    first_attention: class-token attention of the encoder's first layer over the whole image, summed over heads.
    capacity: the tokens that each partition has.  The budgets never exceed it, and with "rectangles" they sum to
    `total`.  Source: Algorithm 1 and equation 1; "strips" is the released code, whose budgets may sum to less.
    """
    whole = min(int(total * alpha), int(capacity[0]))
    tiled = min(total - whole, int(capacity[1:].sum()))
    if split == "strips":
        shares = strip_counts(first_attention, alpha, tiles[0] * tiles[1])
        budgets = (shares * tiled).int().clamp(max=capacity[1:].to(torch.int32)).long()
    else:
        whole = total - tiled
        budgets = apportion(rectangle_sums(first_attention, tiles, grid), tiled, capacity[1:])
    return torch.cat([budgets.new_tensor([whole]), budgets])


def rectangle_sums(
    attention: Float[Tensor, " cells"], tiles: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, " tiles"]:
    """Equation 1: the attention on the part of the whole image that lies under each tile.

    A cell that a tile border cuts counts for the tiles by the share of it that lies in each.
    """
    rows, columns = (overlap(parts, cells).to(attention) for parts, cells in zip(tiles, grid, strict=True))
    return (rows @ attention.view(grid) @ columns.mT).flatten()


def overlap(parts: int, cells: int) -> Float[Tensor, "parts cells"]:
    """The share of each of `cells` equal intervals of a line that lies in each of `parts` equal intervals."""
    part = torch.arange(parts)[:, None] * (cells / parts)
    cell = torch.arange(cells)[None, :].float()
    return (torch.minimum(part + cells / parts, cell + 1) - torch.maximum(part, cell)).clamp(min=0)


def strip_counts(attention: Float[Tensor, " cells"], alpha: float, strips: int) -> Float[Tensor, " strips"]:
    """The released code's shares: top cells counted in contiguous runs of the flat list, as fractions of all marked."""
    if len(attention) % strips:
        raise ValueError(
            f"the released code's strips need a number of tiles that divides the {len(attention)} tokens of a "
            f"partition; got {strips} tiles. split='rectangles' works for any grid"
        )
    marked = max(1, int(len(attention) * (1 - alpha)))  # alpha = 1 marks none in the released code, and divides 0 by 0
    marks = torch.zeros_like(attention)
    marks[attention.topk(marked).indices] = 1
    counts = marks.view(strips, -1).sum(dim=-1)
    return counts / counts.sum()


def apportion(scores: Float[Tensor, " parts"], total: int, capacity: Int[Tensor, " parts"]) -> Int[Tensor, " parts"]:
    """Shares `total` in proportion to the scores: rounded down, at most the capacity, remainders handed out again.

    The first round is the paper's; what rounding and full parts leave over goes round again, and the last few go to
    the highest scores.  If `total` exceeds the whole capacity, every part is full.  Raises ValueError if a score is
    NaN or infinite.
    """
    if not bool(scores.isfinite().all()):
        raise ValueError(f"a budget can be shared in proportion to finite scores only; got {scores.tolist()}")
    kept = torch.zeros_like(capacity)
    left = min(total, int(capacity.sum()))
    while left > 0:
        weight = torch.where(kept < capacity, scores.double().clamp(min=0), 0)
        if float(weight.sum()) == 0:
            weight = (kept < capacity).double()
        step = torch.minimum(proportional(weight, left), capacity - kept)
        if not bool(step.any()):
            step[weight.topk(min(left, int((weight > 0).sum()))).indices] = 1
        kept += step
        left -= int(step.sum())
    return kept


def proportional(scores: Float[Tensor, " parts"], total: int) -> Int[Tensor, " parts"]:
    """floor(total * score / sum of scores).  Source: Algorithm 1, the tiles' budgets."""
    return (total * scores.double() / scores.double().sum()).floor().long()


def split_evenly(total: int, capacity: Int[Tensor, " partitions"]) -> Int[Tensor, " partitions"]:
    """Shares `total` in proportion to what each partition has."""
    return apportion(capacity.float(), total, capacity)
