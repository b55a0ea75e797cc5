"""PruMerge and PruMerge+: keep the tokens whose attention is an outlier, and let them absorb their neighbours.

Source: Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025
(arXiv:2403.15388), with what only the released code says: the scoring layer, its single head, the number of neighbours
and the token for what was dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmaccel.budgets import Budget, kept_count
from vision_tokens.baselines import evenly_spaced
from vision_tokens.hired import split_evenly
from vision_tokens.language_input import MergingMethod
from vision_tokens.layout import ImageView, Merged
from vision_tokens.visionzip import complement


@dataclass(frozen=True, kw_only=True)
class PruMerge(MergingMethod):
    """Keep visual tokens whose attention is an outlier; each absorbs its neighbours, and one holds what was dropped.

    budget: "adaptive", as many as there are outliers in each picture or tile (the paper); or a fraction of an image's
        tokens, in (0, 1], or their number, the token for what was dropped included; tiles share it evenly.
    spatial: PruMerge+, which adds tokens at even distances.  With a fixed budget, three for each that attention chose.
    neighbours: tokens of the most similar keys that a kept one absorbs, weighted by the attention that they get.
    layer: whose attention and keys are read, the heads joined to one: the encoder's "last" (the release), or the
        "feature" layer whose output the language model reads, for a model that was trained with no use of later ones.
    An encoder without a class token is scored by the mean attention that a token gets.  We differ from the release in
    that outliers are found picture by picture, that tokens stay in the order of their cells, and that the token for
    what was dropped sits on the most attended dropped cell.
    """

    name: ClassVar[str] = "prumerge"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "prumerge-plus": {"spatial": True},
        "released-code": {"positions": "packed"},
    }
    joined_heads: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    budget: Budget | Literal["adaptive"] = "adaptive"
    spatial: bool = False
    neighbours: int = 32
    layer: Literal["last", "feature"] = "last"
    positions: Literal["kept", "packed"] = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 0:
            raise ValueError(f"the number of neighbours is at least 0; got {self.neighbours!r}. The release's is 32")
        if self.layer not in ("last", "feature"):
            raise ValueError(f"layer is 'last' or 'feature'; got {self.layer!r}")

    @property
    def attention(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.layer,)

    @property
    def keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.layer,)

    def merge(self, view: ImageView, features: Float[Tensor, "partitions cells channels"]) -> Merged:
        valid = view.layout.valid()
        seats, merged = torch.zeros_like(valid), []
        for partition, budget in enumerate(self._budgets(valid.sum(dim=-1))):
            cells = valid[partition].nonzero().squeeze(-1)
            own, keys = features[partition, cells], view.keys[self.layer][partition, cells]
            attention = view.attention[self.layer][partition, 0, cells]
            if budget is None:
                kept = adaptive(attention, self.spatial)
            else:
                kept = fixed(attention, budget if budget < 2 else budget - 1, self.spatial)
            values = absorb_neighbours(own, keys, attention, kept, self.neighbours)
            dropped = complement(kept, len(cells))
            if len(dropped) and budget not in (0, 1):
                kept = torch.cat([kept, dropped[attention[dropped].argmax()][None]])
                values = torch.cat([values, weighted_sum(own[dropped], attention[dropped])[None]])
            kept, order = kept.sort()
            seats[partition, cells[kept]] = True
            merged.append(values[order])
        return Merged(seats, torch.cat(merged))

    def _budgets(self, have: Int[Tensor, " partitions"]) -> list[int] | list[None]:
        if self.budget == "adaptive":
            return [None] * len(have)
        return split_evenly(kept_count(self.budget, int(have.sum())), have).tolist()


def adaptive(attention: Float[Tensor, " tokens"], spatial: bool = False) -> Int[Tensor, " kept"]:
    """The outliers among the tokens, at least one, in descending order of attention; with `spatial`, others after them.

    An outlier lies above the third quartile by more than 1.5 times the range between first and third.  `spatial` adds
    every k-th token but the last, where k is a third of 1 / (share of outliers), twice rounded down; the release raises
    where that is 0, and we take 1.
    """
    first, third = attention.float().quantile(attention.new_tensor([0.25, 0.75], dtype=torch.float32))
    share = float((attention > third + 1.5 * (third - first)).float().mean())
    kept = best(attention, max(1, round(len(attention) * share)))
    if not spatial:
        return kept
    steps = torch.arange(0, len(attention) - 1, max(1, int(int(1 / max(share, 1 / len(attention))) / 3)))
    steps = steps.to(kept.device)
    return torch.cat([kept, steps[~torch.isin(steps, kept)]])


def fixed(attention: Float[Tensor, " tokens"], count: int, spatial: bool = False) -> Int[Tensor, " kept"]:
    """The `count` most attended tokens in descending order; with `spatial`, a quarter of them, and even ones after."""
    if not spatial:
        return best(attention, count)
    kept = best(attention, count - 3 * count // 4)
    others = complement(kept, len(attention))
    return torch.cat([kept, others[evenly_spaced(len(others), count - len(kept)).to(others.device)]])


def best(attention: Float[Tensor, " tokens"], count: int) -> Int[Tensor, " count"]:
    """The `count` most attended tokens, in descending order; of equal ones the earlier."""
    return attention.argsort(descending=True, stable=True)[:count]


def absorb_neighbours(
    features: Float[Tensor, "tokens channels"],
    keys: Float[Tensor, "tokens width"],
    attention: Float[Tensor, " tokens"],
    kept: Int[Tensor, " kept"],
    neighbours: int,
) -> Float[Tensor, "kept channels"]:
    """Each kept token's feature plus the sum of its neighbours', weighted by the attention that they get.

    Neighbours are the tokens, kept or not, whose keys have the highest cosine similarity to its own.  The weights are
    not normalised: they are shares of one row of attention, so that a token changes little.  Computed in float32,
    returned in the dtype that came.
    """
    directions = torch.nn.functional.normalize(keys.float(), dim=-1)
    similarity = directions[kept] @ directions.mT
    similarity.scatter_(1, kept[:, None], -torch.inf)
    nearest = similarity.topk(min(neighbours, len(features) - 1)).indices
    weights = torch.zeros_like(similarity).scatter_(1, nearest, attention.float()[nearest])
    return (features[kept].float() + weights @ features.float()).to(features.dtype)


def weighted_sum(
    features: Float[Tensor, "tokens channels"], attention: Float[Tensor, " tokens"]
) -> Float[Tensor, " channels"]:
    """The sum of the features, weighted by the attention that they get: one token for all that were dropped."""
    return (attention.float() @ features.float()).to(features.dtype)
