"""Chains and models that are Gaussian throughout, whose laws have closed forms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from scipy import stats
from torch import Tensor

from diffusion.autoregressive.chains import Gaussians
from diffusion.autoregressive.mixtures import MixtureLaw
from diffusion.autoregressive.randomness import Randomness


@dataclass(frozen=True)
class Affine:
    """x_{t-1} = slope_t x_t + intercept_t + shift + std_t e_t; the shift, of every row, acts on the last step alone.

    slopes, intercepts, stds: from the first step, of index T - 1, to the last.
    """

    slopes: tuple[float, ...]
    intercepts: tuple[float, ...]
    stds: tuple[float, ...]
    shift: Tensor
    noisy_end: bool = True
    size: int = 1

    @property
    def steps(self) -> int:
        return len(self.slopes)

    @property
    def fixed(self):
        """With half of what really stays, and nothing at last, so that sweeps make mistakes."""
        keeps = (0.0, *(slope / 2 for slope in self.slopes[-2::-1]))
        return torch.tensor([keeps, (0.5,) * self.steps, self.stds[::-1]], dtype=torch.float64)

    def at(self, rows):
        return replace(self, shift=self.shift[rows])

    def __call__(self, states, indices):
        position = self.steps - 1 - indices
        slope, intercept, std = (
            torch.tensor(values, dtype=states.dtype)[position][:, None, None]
            for values in (self.slopes, self.intercepts, self.stds)
        )
        last = (indices == 0)[:, None, None] * self.shift[:, None]
        return Gaussians(slope * states + intercept + last, std.expand_as(states))

    def at_shift(self, shift):
        return replace(self, shift=shift)

    def law(self) -> tuple[float, float]:
        """Mean, without the shift, and std of the token."""
        mean, variance = 0.0, 1.0
        for slope, intercept, std in zip(self.slopes, self.intercepts, self.stds, strict=True):
            mean, variance = slope * mean + intercept, slope**2 * variance + std**2
        return mean, variance**0.5


def target(shift: Tensor, **more) -> Affine:
    """The study's two-step chain, of mean .27 and std .9795."""
    return Affine((0.7, 0.9), (0.3, 0.0), (0.5, 0.6), shift, **more)


def draft(shift: Tensor, **more) -> Affine:
    """The study's draft for it; 1 minus the total variation between the two is .915."""
    return Affine((0.6, 0.85), (0.1, 0.0), (0.65, 0.5), shift, **more)


def mixture(weights, means, stds, rows: int) -> MixtureLaw:
    """The same one-dimensional mixture in every row."""
    weights, means, stds = (
        torch.tensor(values, dtype=torch.float64).expand(rows, -1) for values in (weights, means, stds)
    )
    return MixtureLaw(weights.log(), Gaussians(means[..., None], stds[..., None]))


def draws(count: int, seed: int = 0) -> Randomness:
    return Randomness.of(torch.Generator().manual_seed(seed), count, torch.zeros((), dtype=torch.float64))


def ks(values: Tensor, mean: float = 0.0, std: float = 1.0) -> float:
    """The p-value of the Kolmogorov-Smirnov test against a normal law."""
    return float(stats.kstest(((values - mean) / std).flatten().numpy(), "norm").pvalue)


class AutoregressiveRun:
    """In the place of a `ModelRun`: token i is drawn by a chain whose last step is shifted by memory x token i-1."""

    def __init__(self, chain, memory: float) -> None:
        self.chain, self.memory = chain, memory
        self.calls: list[int] = []
        self.trunk = None

    def conditions(self, tokens, rows, start, count):
        place = start[:, None] + torch.arange(int(count.max()))
        before = tokens[rows[:, None], (place - 1).clamp(0, tokens.shape[1] - 1)]
        self.calls.append(len(rows))
        return torch.where((place == 0)[..., None], 0.0, before)[None]

    def law(self, conditions, places):
        return self.chain(self.memory * conditions[0, :, 0])

    def innovations(self, tokens: Tensor) -> Tensor:
        """What is independent and standard normal if, and only if, the tokens follow this model's law."""
        mean, std = self.chain(torch.zeros(1)).law()
        before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)
        return ((tokens - mean - self.memory * before) / std)[..., 0]
