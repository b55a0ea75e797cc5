"""Who survives: draws from log weights, and choices by reward.  Pure functions; the uniform numbers are arguments.

A log weight is any number or -inf, and adding a constant to all of them changes nothing.  Resampling keeps as many
particles as there are, and returns their ancestors in ascending order: a survivor stays near its row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

Scheme = Literal["systematic", "stratified", "residual", "multinomial"]


def normalised(log_weights: Float64[Tensor, "*chains particles"]) -> Float64[Tensor, "*chains particles"]:
    """Weights that sum to 1 along the last axis.  -inf is weight zero; if all are -inf, all weights are equal."""
    nothing = (log_weights == -torch.inf).all(dim=-1, keepdim=True)
    return log_weights.masked_fill(nothing, 0.0).softmax(dim=-1)


def effective_sample_size(log_weights: Float64[Tensor, "particles"]) -> float:
    """1 / sum w²: how many equally weighted particles these are worth, in [1, their number]."""
    return float(1 / normalised(log_weights).square().sum())


def cumulative(weights: Float64[Tensor, "*chains particles"]) -> Float64[Tensor, "*chains particles"]:
    """Running sums that end at exactly 1, from the last positive weight on: no draw runs past it."""
    sums = weights.cumsum(dim=-1)
    return sums / sums[..., -1:]


def systematic(
    log_weights: Float64[Tensor, "particles"], uniforms: Float64[Tensor, "particles"]
) -> Int64[Tensor, "particles"]:
    """One uniform number, the first, places a comb (u + k) / N over the weights: [N] ancestors.

    Unbiased: E[copies] = N w.  |copies - N w| < 1 for every particle.  Equal weights give the identity.
    """
    teeth = torch.arange(len(log_weights), dtype=torch.float64)
    return _inverse(log_weights, (uniforms[0] + teeth) / len(log_weights))


def stratified(
    log_weights: Float64[Tensor, "particles"], uniforms: Float64[Tensor, "particles"]
) -> Int64[Tensor, "particles"]:
    """One uniform number in each of N equal parts of [0, 1): [N] ancestors.

    Unbiased.  |copies - N w| < 2.  Equal weights give the identity.
    """
    strata = torch.arange(len(log_weights), dtype=torch.float64)
    return _inverse(log_weights, (uniforms + strata) / len(log_weights))


def residual(
    log_weights: Float64[Tensor, "particles"], uniforms: Float64[Tensor, "particles"]
) -> Int64[Tensor, "particles"]:
    """floor(N w) copies of each, the rest drawn independently in proportion to what flooring left: [N] ancestors.

    Unbiased.  copies > N w - 1.  Equal weights give the identity.
    """
    count = len(log_weights)
    expected = count * normalised(log_weights)
    sure = (expected + 1e-9).floor()  # 1e-9: N times 1/N may round below 1
    ancestors = torch.arange(count).repeat_interleave(sure.long())
    drawn = count - len(ancestors)
    if drawn:
        rest = _inverse((expected - sure).clamp(min=0).log(), uniforms[:drawn])
        ancestors = torch.cat([ancestors, rest]).sort().values
    return ancestors


def multinomial(
    log_weights: Float64[Tensor, "particles"], uniforms: Float64[Tensor, "particles"]
) -> Int64[Tensor, "particles"]:
    """N independent draws: [N] ancestors.  Unbiased, with the largest variance of the four: N w (1 - w) copies."""
    return _inverse(log_weights, uniforms).sort().values


SCHEMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
    "multinomial": multinomial,
}


def draw(
    log_weights: Float64[Tensor, "chains candidates"], uniforms: Float64[Tensor, "chains"]
) -> Int64[Tensor, "chains"]:
    """One candidate of each chain, with probability softmax(log_weights)."""
    return torch.searchsorted(cumulative(normalised(log_weights)), uniforms[:, None], right=True)[:, 0]


def top(rewards: Float64[Tensor, "rows"], count: int) -> Int64[Tensor, "count"]:
    """The rows of the `count` highest rewards, best first; equal rewards keep their order."""
    return rewards.argsort(descending=True, stable=True)[:count]


def best_of_each(rewards: Float64[Tensor, "chains candidates"]) -> Int64[Tensor, "chains"]:
    """The best candidate of each chain; of equal ones the first."""
    return rewards.argsort(dim=-1, descending=True, stable=True)[:, 0]


def accept_first(rewards: Float64[Tensor, "rows"], threshold: float) -> int | None:
    """The first row whose reward is above the threshold, strictly; None if none is."""
    better = (rewards > threshold).nonzero()[:, 0].tolist()
    return better[0] if better else None


def uniform_numbers(count: int, seed: int) -> Float64[Tensor, "count"]:
    """Numbers in [0, 1), drawn on the CPU in float64: the same on every device."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inverse(log_weights: Tensor, positions: Tensor) -> Tensor:
    """For each position in [0, 1) the first index whose cumulative weight lies above it; never one of weight zero."""
    return torch.searchsorted(cumulative(normalised(log_weights)), positions, right=True)
