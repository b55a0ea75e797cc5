"""Several rewards as one: a weighted mean, with weights that are fitted to a judge.

Oshima et al. 2025, latent beam search (arXiv:2501.19252): a single score of motion or beauty is easily gamed and says
little of what people like; the combination that correlates best with a vision-language judge says more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from diffusion.rewards.base import Prompts, Reward, RewardField, as_reward
from diffusion.rewards.checking import checked, scored

COMBINATIONS = 1_000_000
FEWEST = 3  # pictures: any two lie on a line


@dataclass(frozen=True, kw_only=True)
class Calibrated(Reward):
    """The weighted mean of several rewards: sum of weight times reward, divided by the sum of the weights.

    In the units of its rewards, which the weights have to balance.  Rewards of weight 0 are not computed; a row that
    one of the others gives no finite number scores minus infinity.
    correlation: Pearson's, to the judge that the weights were fitted to (`calibrate`); None for weights from elsewhere.
    """

    name: ClassVar[str] = "calibrated"

    rewards: tuple[RewardField, ...]
    weights: tuple[float, ...]
    correlation: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rewards", tuple(as_reward(reward) for reward in self.rewards))
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        if len(self.weights) != len(self.rewards):
            raise ValueError(
                f"every reward has one weight; got {len(self.rewards)} rewards and {len(self.weights)} weights"
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights) or sum(self.weights) == 0:
            raise ValueError(
                f"weights are numbers from 0 up, not all 0; got {list(self.weights)}. To reward less of something, "
                "pass a function that gives its negative"
            )

    def __call__(self, images: Tensor, prompts: Prompts | None, **context: Any) -> Tensor:
        prompts = [None] * len(images) if prompts is None else prompts
        total = sum(
            weight * scored(reward, images, prompts, **context).values
            for reward, weight in zip(self.rewards, self.weights, strict=True)
            if weight
        )
        assert isinstance(total, Tensor)  # one weight is positive
        return (total / sum(self.weights)).float().to(images.device)


def calibrate(
    rewards: Sequence[Any],
    judge: Callable[..., Any] | Sequence[float] | Tensor | str,
    images: Tensor,
    prompts: Prompts,
    grid: Sequence[float] = (0, 0.25, 0.5, 0.75, 1),
) -> Calibrated:
    """The weights on a grid whose weighted mean correlates best with a judge.

    rewards: anything that `as_reward` takes.
    judge: likewise, or its scores, one a row: people's, or a vision-language model's.
    images, prompts: what both score.  grid: the weights to try, for every reward.
    Rows that a reward or the judge gives no finite number are left out.  Among equal correlations (to 1e-9) the
    smallest sum of weights wins, so a reward that adds nothing gets 0; among equal sums the combination that is tried
    first, later rewards varying fastest.
    Raises ValueError if fewer than 3 rows are left, the judge or all rewards give the same to every row, or the grid
    has more than 1,000,000 combinations.
    """
    functions = [as_reward(reward) for reward in rewards]
    _check_grid(grid, len(functions))
    columns = torch.stack([scored(reward, images, prompts).values for reward in functions], dim=1)
    if isinstance(judge, str) or callable(judge):
        wanted = scored(judge, images, prompts).values
    else:
        wanted = checked(judge, len(images)).values
    finite = columns.isfinite().all(dim=1) & wanted.isfinite()
    if int(finite.sum()) < FEWEST:
        raise ValueError(
            f"a correlation needs at least {FEWEST} rows with finite scores; got {int(finite.sum())} of {len(images)}. "
            "Pass more images"
        )
    weights, correlation = best_weights(columns[finite], wanted[finite], grid)
    return Calibrated(rewards=tuple(functions), weights=tuple(weights.tolist()), correlation=correlation)


def best_weights(
    columns: Float64[Tensor, "rows rewards"], judge: Float64[Tensor, " rows"], grid: Sequence[float]
) -> tuple[Float64[Tensor, " rewards"], float]:
    """The weights on the grid with the highest Pearson correlation of `columns @ weights` to `judge`, and that.

    Means and covariances are taken once, so that the cost of a combination does not depend on the number of rows.
    """
    centred, target = _centred(columns), _centred(judge[:, None])[:, 0]
    if not target.any():
        raise ValueError(f"the judge gives {float(judge[0]):.4g} to every row; there is nothing to fit to")
    if not centred.any():
        raise ValueError("every reward gives the same to all rows; pass images that differ in what they measure")
    values = torch.tensor(list(grid), dtype=torch.float64)
    weights = torch.cartesian_prod(*[values] * columns.shape[1]).reshape(-1, columns.shape[1])
    variance = ((weights @ (centred.mT @ centred)) * weights).sum(dim=1)
    parts = weights**2 @ (centred**2).sum(dim=0)  # what the variance would be if the rewards were uncorrelated
    correlation = weights @ (centred.mT @ target) / (variance.clamp(min=0).sqrt() * target.norm())
    correlation[variance <= 1e-12 * parts] = -torch.inf  # a combination that is the same for all rows
    sums = weights.sum(dim=1).masked_fill(correlation < correlation.max() - 1e-9, torch.inf)
    best = int(sums.argmin())
    return weights[best], float(correlation[best])


def _centred(columns: Float64[Tensor, "rows columns"]) -> Float64[Tensor, "rows columns"]:
    """Each column minus its mean; exactly 0 where it is constant."""
    low, high = columns.amin(dim=0), columns.amax(dim=0)
    varies = high - low > 1e-9 * torch.maximum(low.abs(), high.abs())
    return (columns - columns.mean(dim=0)) * varies


def _check_grid(grid: Sequence[float], rewards: int) -> None:
    if not rewards:
        raise ValueError("there is nothing to calibrate: pass at least one reward")
    if not all(math.isfinite(value) and value >= 0 for value in grid) or not any(grid):
        raise ValueError(f"the grid holds weights from 0 up, one of them positive; got {list(grid)}")
    if len(grid) ** rewards > COMBINATIONS:
        raise ValueError(
            f"{len(grid)} weights for {rewards} rewards are {len(grid) ** rewards:,} combinations, more than "
            f"{COMBINATIONS:,}; pass a smaller grid or fewer rewards"
        )
