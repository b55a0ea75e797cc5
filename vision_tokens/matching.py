"""Bipartite soft matching: which tokens of a sequence merge into which.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv:2210.09461), section 3; AIM
(arXiv:2412.03248) merges by the same rule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Matching(NamedTuple):
    """How a sequence becomes shorter.

    into: for every token, its place in the shorter sequence.
    seats: for every place there, the token that others may have merged into.
    """

    into: Int[Tensor, "batch tokens"]
    seats: Int[Tensor, "batch left"]


class Grouping(NamedTuple):
    """After some matchings: for every patch the place of its token, and for every token how many patches it holds."""

    into: Int[Tensor, "batch patches"]
    sizes: Float[Tensor, "batch tokens"]


def match(metric: Float[Tensor, "batch tokens width"], merged: int, protected: int = 0) -> Matching:
    """Merges `merged` tokens at even places into the most similar tokens at odd places, the most similar pairs first.

    metric: what the cosine similarity is taken of.  merged: at most half of the unprotected tokens merge.
    protected: with 1 the first token (class) neither merges nor, being at an even place, is merged into; with 2 the
        second (distillation) likewise; both stay in front.
    The shorter sequence has first the even tokens that stay, in order if there are protected ones and by descending
    similarity otherwise, as the released codes have it, then the odd ones in order.
    """
    batch, tokens = metric.shape[:2]
    merged = min(merged, (tokens - protected) // 2)
    places = torch.arange(tokens, device=metric.device).expand(batch, -1)
    if merged <= 0:
        return Matching(places, places)
    direction = torch.nn.functional.normalize(metric, dim=-1)
    similarity = direction[:, ::2] @ direction[:, 1::2].mT
    if protected > 0:
        similarity[:, 0] = -torch.inf
    if protected > 1:
        similarity[:, :, 0] = -torch.inf
    score, best = similarity.max(dim=-1)
    order = score.argsort(dim=-1, descending=True)
    leaving, staying = order[:, :merged], order[:, merged:]
    if protected:
        staying = staying.sort(dim=-1).values
    seats = torch.cat([2 * staying, places[:, 1::2]], dim=-1)
    if protected > 1:
        left = seats.shape[1]
        front = torch.tensor([0, staying.shape[1]], device=seats.device)
        rest = torch.arange(left, device=seats.device)
        seats = seats[:, torch.cat([front, rest[~torch.isin(rest, front)]])]
    into = torch.empty_like(places).scatter_(1, seats, places[:, : seats.shape[1]].contiguous())
    targets = into.gather(1, 2 * best.gather(1, leaving) + 1)
    return Matching(into.scatter_(1, 2 * leaving, targets), seats)


def merge(
    tokens: Float[Tensor, "batch tokens channels"],
    matching: Matching,
    sizes: Float[Tensor, "batch tokens"] | None = None,
) -> tuple[Float[Tensor, "batch left channels"], Float[Tensor, "batch left"]]:
    """The shorter sequence, each token the mean of those that merged, and how many it stands for.

    sizes: how many each token stands for so far, the weights of the mean; None for one each.  Computed in float32; the
    tokens come back in the dtype that they had.
    """
    weights = torch.ones(tokens.shape[:2], device=tokens.device) if sizes is None else sizes
    batch, left = matching.seats.shape
    total = weights.new_zeros(batch, left).scatter_add_(1, matching.into, weights)
    weighted = tokens.float() * weights[..., None]
    sums = weighted.new_zeros(batch, left, tokens.shape[-1])
    sums.scatter_add_(1, matching.into[..., None].expand_as(weighted), weighted)
    return (sums / total[..., None]).to(tokens.dtype), total


def unmerge(
    tokens: Float[Tensor, "batch left channels"], into: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens channels"]:
    """The longer sequence, every token a copy of the one that it merged into."""
    return tokens.gather(1, into[..., None].expand(-1, -1, tokens.shape[-1]))


def spread(
    rows: Float[Tensor, "batch rows tokens"], grouping: Grouping, shared: bool
) -> Float[Tensor, "batch rows patches"]:
    """What was read of the tokens, for every patch; if `shared`, an equal share of what its token has."""
    rows = rows / grouping.sizes[:, None].to(rows.dtype) if shared else rows
    return rows.gather(-1, grouping.into[:, None].expand(-1, rows.shape[1], -1))
