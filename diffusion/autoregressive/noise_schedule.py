"""The noise levels of a diffusion head, respaced to the steps that a sampler takes.

Index 0 is the level nearest to the data.  Everything is float64, [steps].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

Kind = Literal["cosine", "linear", "log-snr"]
Prediction = Literal["epsilon", "velocity"]
TRAINING_STEPS = 1000
LOG_SNR_RANGE = (-6.0, 6.0)
"""Between the noisiest and the cleanest level of the `log-snr` schedule."""


@dataclass(frozen=True)
class NoiseSchedule:
    """Levels x = signal x0 + noise eps, and the posterior steps between them.

    times: what the network is told, in 0..1000.  betas: the variance that a step to the next level removes.
    x0_weight, x_weight: the mean of the step is x0_weight x0 + x_weight x (Ho et al. 2020, equation 7).
    posterior_variance: its variance given x0; at index 0, where that is 0, its neighbour's (the log would diverge).
    """

    times: Float64[Tensor, "steps"]
    alpha_products: Float64[Tensor, "steps"]
    betas: Float64[Tensor, "steps"]
    x0_weight: Float64[Tensor, "steps"]
    x_weight: Float64[Tensor, "steps"]
    posterior_variance: Float64[Tensor, "steps"]

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.times)

    def mean_weights(self, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """The mean of a step as `state x + predicted (network's output)`: the two weights, [steps].

        x0 = (x - noise eps) / signal, or x0 = signal x - noise v with v = signal eps - noise x0.
        """
        signal, noise = self.alpha_products.sqrt(), (1 - self.alpha_products).sqrt()
        if prediction == "epsilon":
            return self.x_weight + self.x0_weight / signal, -self.x0_weight * noise / signal
        return self.x_weight + self.x0_weight * signal, -self.x0_weight * noise


def respaced(kind: Kind, steps: int) -> NoiseSchedule:
    """The schedule of a sampler with so many steps.

    cosine, linear: 1000 training levels, of which those at round(i 999 / (steps - 1)) are kept, with betas computed
    again (Nichol and Dhariwal 2021, arXiv:2102.09672, section 4).  log-snr: levels at even log signal-to-noise ratios.
    Raises ValueError for fewer than 2 steps, or more than there are levels.
    """
    if not 2 <= steps <= TRAINING_STEPS:
        raise ValueError(f"a diffusion head takes 2 to {TRAINING_STEPS} steps a token; got {steps!r}")
    if kind == "log-snr":
        low, high = LOG_SNR_RANGE
        levels = torch.linspace(high, low, steps, dtype=torch.float64)
        return _from_products(time_of(levels), levels.sigmoid())
    times = torch.round(torch.arange(steps, dtype=torch.float64) * (TRAINING_STEPS - 1) / (steps - 1))
    return _from_products(times, alpha_products(kind)[times.long()])


def _from_products(times: Tensor, products: Tensor) -> NoiseSchedule:
    before = torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]])
    betas = 1 - products / before
    variance = betas * (1 - before) / (1 - products)
    return NoiseSchedule(
        times=times,
        alpha_products=products,
        betas=betas,
        x0_weight=betas * before.sqrt() / (1 - products),
        x_weight=(1 - before) * (1 - betas).sqrt() / (1 - products),
        posterior_variance=torch.cat([variance[1:2], variance[1:]]),
    )


def alpha_products(kind: Kind) -> Float64[Tensor, "levels"]:
    """The products of 1 - beta over the training levels of the `cosine` or `linear` schedule."""
    if kind == "linear":
        betas = torch.linspace(1e-4, 0.02, TRAINING_STEPS, dtype=torch.float64)
    else:
        time = torch.arange(TRAINING_STEPS + 1, dtype=torch.float64) / TRAINING_STEPS
        curve = ((time + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        betas = (1 - curve[1:] / curve[:-1]).clamp_max(0.999)
    return (1 - betas).cumprod(0)


def time_of(log_snr: Tensor) -> Tensor:
    """What the network is told of a log signal-to-noise ratio: 0 at the cleanest level, 1000 at the noisiest."""
    low, high = LOG_SNR_RANGE
    return TRAINING_STEPS * (high - log_snr) / (high - low)


def training_levels(kind: Kind, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Random levels for training: times and alpha products, [count].

    Log-SNRs are uniform on a range half a unit wider than sampling uses on both sides.
    """
    if kind == "log-snr":
        low, high = LOG_SNR_RANGE
        level = torch.rand(count, generator=generator, dtype=torch.float64) * (high - low + 1) + low - 0.5
        return time_of(level), level.sigmoid()
    index = torch.randint(TRAINING_STEPS, (count,), generator=generator)
    return index.double(), alpha_products(kind)[index]
