"""VisionZip: the tokens that the encoder looks at most, and a few more that stand for all others.

Source: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025
(arXiv:2412.04467).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmaccel.budgets import Budget, kept_count
from vision_tokens.hired import split_evenly
from vision_tokens.language_input import MergingMethod
from vision_tokens.layout import ImageView, Merged


@dataclass(frozen=True, kw_only=True)
class VisionZip(MergingMethod):
    """Keep the most attended visual tokens, and merge the others into a few that stand for them.

    budget: fraction of an image's tokens kept, in (0, 1], or their number; tiles share it evenly.
    contextual: share of the kept tokens that are merged ones; the paper's 54 + 10, 108 + 20 and 162 + 30 are 10/64.
    merging: "mean" averages a merged token with those assigned to it, as the paper says; "sum" adds their mean to it,
        as the released code does, which makes it up to twice as long as the model expects.
    An encoder without a class token is scored by the mean attention that a token gets.  We differ from the release in
    that the class token itself is not kept (models that select "default" features never saw it), that tokens stay in
    the order of their cells with newline tokens between rows, and that padding of tiles takes no part.
    """

    name: ClassVar[str] = "visionzip"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llava-1.5-64": {"budget": 64},
        "llava-1.5-128": {"budget": 128},
        "llava-1.5-192": {"budget": 192},
        "llava-next-320": {"budget": 320},
        "released-code": {"merging": "sum", "positions": "packed"},
    }
    attention: ClassVar[tuple[str, ...]] = ("feature",)
    keys: ClassVar[tuple[str, ...]] = ("feature",)

    budget: Budget = 0.2
    contextual: float = 10 / 64
    merging: Literal["mean", "sum"] = "mean"
    positions: Literal["kept", "packed"] = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual <= 1:
            raise ValueError(
                f"contextual, the share of merged tokens among the kept ones, lies in [0, 1]; got {self.contextual!r}. "
                "The paper's is 10 / 64"
            )
        if self.merging not in ("mean", "sum"):
            raise ValueError(f"merging is 'mean' or 'sum'; got {self.merging!r}")

    def merge(self, view: ImageView, features: Float[Tensor, "partitions cells channels"]) -> Merged:
        valid = view.layout.valid()
        scores = view.attention["feature"].sum(dim=1)
        have = valid.sum(dim=-1)
        seats, merged = torch.zeros_like(valid), []
        for partition, kept in enumerate(split_evenly(kept_count(self.budget, int(have.sum())), have).tolist()):
            cells = valid[partition].nonzero().squeeze(-1)
            contextual = int(kept * self.contextual)
            dominant, targets = choose(scores[partition, cells], kept - contextual, contextual)
            seated = torch.cat([dominant, targets]).sort().values
            own = absorb(
                features[partition, cells], view.keys["feature"][partition, cells], dominant, targets, self.merging
            )
            seats[partition, cells[seated]] = True
            merged.append(own[seated])
        return Merged(seats, torch.cat(merged))


def choose(
    scores: Float[Tensor, " tokens"], dominant: int, contextual: int
) -> tuple[Int[Tensor, " dominant"], Int[Tensor, " contextual"]]:
    """The tokens of highest scores, in order, and among the others, in order, targets at even distances.

    scores: the attention that each token gets.  The distance is the released code's: what remains beyond `contextual`
    whole steps has no target of its own.
    """
    best = scores.argsort(descending=True, stable=True)[:dominant].sort().values
    others = complement(best, len(scores))
    step = max(1, len(others) // max(1, contextual))
    return best, others[::step][:contextual]


def absorb(
    features: Float[Tensor, "tokens channels"],
    keys: Float[Tensor, "tokens width"],
    dominant: Int[Tensor, " dominant"],
    targets: Int[Tensor, " contextual"],
    merging: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, "tokens channels"]:
    """The features, where each target holds what it and the tokens with the most similar keys merge to.

    Every token that is neither dominant nor a target goes to the target whose key has the highest cosine similarity
    to its own.  Computed in float32, returned in the dtype that came.
    """
    out = features.clone()
    absorbed = complement(torch.cat([dominant, targets]), len(features))
    if not len(targets) or not len(absorbed):
        return out
    directions = torch.nn.functional.normalize(keys.float(), dim=-1)
    nearest = (directions[absorbed] @ directions[targets].mT).argmax(dim=-1)
    own, wide = features[targets].float(), features[absorbed].float()
    sums = torch.zeros_like(own).index_add(0, nearest, wide)
    counts = torch.bincount(nearest, minlength=len(targets))[:, None]
    merged = own + sums / counts.clamp(min=1) if merging == "sum" else (own + sums) / (1 + counts)
    out[targets] = merged.to(out.dtype)
    return out


def complement(indices: Int[Tensor, " some"], total: int) -> Int[Tensor, " others"]:
    """The whole numbers from 0 to total - 1 that are not among `indices`, ascending."""
    others = torch.ones(total, dtype=torch.bool, device=indices.device)
    others[indices] = False
    return others.nonzero().squeeze(-1)
