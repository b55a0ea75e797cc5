"""SparseVLM: the text tokens that the picture speaks to rate the visual tokens; some of the dropped are recycled.

Source: Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025
(arXiv:2410.04417), section 3; the counts and the clustering are those of the released code, version 1.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmaccel.budgets import Budget
from vision_tokens.decoder_layers import DecoderMethod, checked_cuts, keep_highest
from vision_tokens.layer_view import LayerView

TABLES = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
"""Of 576 visual tokens, how many stay behind the three cuts, by the nominal mean over layers."""
NEIGHBOURS = 5  # that a token's density is computed from


@dataclass(frozen=True, kw_only=True)
class SparseVLM(DecoderMethod):
    """Drop visual tokens at three depths, rated by the text tokens that matter; clusters of some dropped ones stay.

    budget: mean share (or number) of visual tokens over the layers, recycled ones included; the counts lie between
        those of the neighbouring tables.
    table: a nominal budget of the released code, 192, 128, 96 or 64 of 576 tokens, in place of a budget: its counts,
        with recycled tokens on top; 192 if neither is given.
    cut_before: the layers before which tokens go; by default 3, 7 and 16 of 32, scaled.
    recycle: whether the best of the dropped tokens are clustered by density peaks, and the clusters' means stay.
    Raters are chosen once, from the embeddings: text tokens behind the first visual one that the visual tokens match
    better than the average.  A cluster takes the place and position of its centre, where the released code puts
    clusters behind the kept tokens and numbers positions anew; positions="packed" numbers them anew here.
    """

    name: ClassVar[str] = "sparsevlm"
    amounts: ClassVar[tuple[str, ...]] = ("table",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"llava-1.5-7b-{nominal}": {"table": nominal, "cut_before": (3, 7, 16)} for nominal in TABLES
    }

    budget: Budget | None = None
    table: Literal[192, 128, 96, 64] | None = None
    cut_before: tuple[int, int, int] | None = None
    recycle: bool = True
    positions: Literal["kept", "packed"] = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table is not None and self.table not in TABLES:
            raise ValueError(
                f"the released code has tables for {', '.join(map(str, TABLES))} tokens; got {self.table!r}"
            )

    @property
    def merges(self) -> bool:
        return self.recycle

    def cuts(self, layers: int) -> Sequence[int]:
        return checked_cuts(self, self._cuts(layers), layers)

    def _cuts(self, layers: int) -> Sequence[int]:
        if self.cut_before is not None:
            return self.cut_before
        cuts: list[int] = []
        for cut in (3, 7, 16):
            cuts.append(max(round(cut * layers / 32), cuts[-1] + 1 if cuts else 1))
        return cuts

    def kept(self, layers: int, visual: int) -> Sequence[int]:
        """Tokens kept for their scores alone; recycled ones come on top (within the budget, if one is given)."""
        mean = self.mean_share(visual)
        held, kept = visual, []
        if mean is None:
            for count in TABLES[self.table or 192]:
                kept.append(max(0, min(count, held - 1)))
                held = kept[-1] + self._recycled(held - kept[-1])
            return kept
        for share in table_shares(mean, self._cuts(layers), layers):
            total = min(round(visual * share), held)
            fitting = (count for count in range(total, -1, -1) if count + self._recycled(held - count) <= total)
            kept.append(next(fitting, 0))
            held = kept[-1] + self._recycled(held - kept[-1])
        return kept

    def _recycled(self, dropped: int) -> int:
        return clusters_of(dropped)[1] if self.recycle else 0

    def mark(
        self,
        embeddings: Float[Tensor, "batch tokens width"],
        visual: Bool[Tensor, "batch tokens"],
        real: Bool[Tensor, "batch tokens"],
    ) -> Bool[Tensor, "batch tokens"]:
        text = real & ~visual
        behind = text & (visual.cumsum(dim=-1) > 0)
        text = torch.where(behind.any(dim=-1, keepdim=True), behind, text)
        marks = torch.zeros_like(visual)
        for row in range(len(visual)):
            if bool(visual[row].any()):
                words = text[row].nonzero().squeeze(-1)
                marks[row, words[text_raters(embeddings[row, visual[row]], embeddings[row, words])]] = True
        return marks

    def score(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        assert view.marked is not None
        return rating(view.rows(view.marked), view.marked >= 0)

    def choose(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        scores: Float[Tensor, "batch tokens"],
        visual: Bool[Tensor, "batch tokens"],
        counts: Sequence[int],
    ) -> tuple[Float[Tensor, "batch tokens width"], Bool[Tensor, "batch tokens"]]:
        keep = keep_highest(scores, visual, counts)
        if not self.recycle:
            return hidden, keep | ~visual
        hidden, keep = hidden.clone(), keep.clone()
        for row in range(len(hidden)):
            dropped = (visual[row] & ~keep[row]).nonzero().squeeze(-1)
            chosen, clusters = clusters_of(len(dropped))
            if clusters == 0:
                continue
            places = dropped[scores[row, dropped].argsort(descending=True, stable=True)[:chosen]].sort().values
            centres, means = density_peaks(hidden[row, places], clusters)
            hidden[row, places[centres]] = means
            keep[row, places[centres]] = True
        return hidden, keep | ~visual


def table_shares(mean: float, cuts: Sequence[int], layers: int) -> list[float]:
    """The shares kept at three cuts whose mean over layers is given: a straight line between neighbouring tables.

    Nothing kept and everything kept count as tables.  The mean is linear in the shares, and so is met exactly.
    """
    lengths = [end - start for start, end in zip(cuts, (*cuts[1:], layers), strict=True)]

    def mean_of(shares: Sequence[float]) -> float:
        return (cuts[0] + sum(length * share for length, share in zip(lengths, shares, strict=True))) / layers

    tables = [(0.0,) * 3, *([count / 576 for count in TABLES[name]] for name in sorted(TABLES)), (1.0,) * 3]
    low, high = next(pair for pair in pairwise(tables) if mean <= mean_of(pair[1]) + 1e-9)
    rise = mean_of(high) - mean_of(low)
    weight = min(max((mean - mean_of(low)) / rise, 0.0), 1.0)
    return [a + weight * (b - a) for a, b in zip(low, high, strict=True)]


def clusters_of(dropped: int) -> tuple[int, int]:
    """How many of the dropped tokens are recycled, and into how many clusters: the released code's counts."""
    if dropped == 0:
        return 0, 0
    chosen = min(dropped, int(0.3 * dropped) + 1)
    return chosen, int(chosen / 10) + 1


def text_raters(visual: Float[Tensor, "visual width"], text: Float[Tensor, "text width"]) -> Bool[Tensor, " text"]:
    """The text tokens whose share of the visual tokens' similarity is above the mean.  Source: equation 5."""
    shares = (visual @ text.mT).softmax(dim=-1, dtype=torch.float32).mean(dim=0)
    return shares > shares.mean()


def rating(
    rows: Float[Tensor, "batch heads raters tokens"], raters: Bool[Tensor, "batch raters"]
) -> Float[Tensor, "batch tokens"]:
    """What each token gets of the raters' attention: the mean over heads, then over raters.  Source: equation 6."""
    weights = (raters / raters.sum(dim=-1, keepdim=True).clamp(min=1)).to(rows.dtype)
    return (weights[:, None] @ rows.mean(dim=1))[:, 0]


def density_peaks(
    features: Float[Tensor, "tokens width"], clusters: int, neighbours: int = NEIGHBOURS
) -> tuple[Int[Tensor, " clusters"], Float[Tensor, "clusters width"]]:
    """Centres of clusters by density peaks (Rodriguez and Laio, 2014), and the clusters' means.

    A token's density falls with its distance to its nearest neighbours; centres are dense and far from denser tokens.
    Every token joins its nearest centre.  The released code adds unseeded noise of 1e-6 to the densities; we do not,
    and of equal tokens the earlier is the denser.
    """
    flat = features.float()
    distance = torch.cdist(flat, flat) / features.shape[-1] ** 0.5
    nearest = distance.topk(min(neighbours, len(flat)), dim=-1, largest=False).values
    density = (-nearest.square().mean(dim=-1)).exp()
    order = torch.arange(len(flat), device=flat.device)
    equal = density[None] == density[:, None]
    denser = (density[None] > density[:, None]) | (equal & (order[None] < order[:, None]))
    height = torch.where(denser, distance, distance.max()).min(dim=-1).values
    centres = (height * density).topk(clusters).indices
    nearest_centre = distance[:, centres].argmin(dim=-1)
    nearest_centre[centres] = torch.arange(clusters, device=flat.device)
    member = torch.nn.functional.one_hot(nearest_centre, clusters).to(flat.dtype)
    means = (member.mT @ flat) / member.sum(dim=0)[:, None]
    return centres, means.to(features.dtype)
