"""Paths between data and noise, x = alpha(t) x0 + sigma(t) eps with noise at t = 1, and what moves along them.

The conditional means (x0, eps) of a noisy latent do not depend on its path: a latent on any path is a scaled latent of
any other, at the time of equal alpha / sigma.  So velocities and scores are converted by way of (x0, eps), which is
what a denoiser gives here, and no formula for a pair of paths is needed.

Sources: arXiv:2503.19385, sections 4.1, 4.2 and appendix; Song et al., arXiv:2011.13456, equation 7.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float64
from torch import Tensor

from diffusion.particles import Level, weighted

Times: TypeAlias = Float64[Tensor, "*rows"]


class Path(ABC):
    """alpha and sigma over time in [0, 1], and their derivatives; float64."""

    @abstractmethod
    def alpha(self, t: Times) -> Times:
        """How much signal."""

    @abstractmethod
    def sigma(self, t: Times) -> Times:
        """How much noise."""

    @abstractmethod
    def slopes(self, t: Times) -> tuple[Times, Times]:
        """The derivatives of alpha and sigma."""

    @abstractmethod
    def time(self, ratio: Times) -> Times:
        """The time at which alpha / sigma is `ratio`, in [0, infinity]."""

    def level(self, t: float | Tensor) -> Level:
        """The level at a time."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return Level(self.alpha(t), self.sigma(t))

    def meet(self, level: Level) -> tuple[Times, Times]:
        """(time, scale): a latent at `level`, of any path, is `scale` times a latent of this path at `time`.

        That is the interpolant conversion: a model of this path is asked at (x / scale, time).
        """
        time = self.time(level.alpha / level.sigma)
        return time, (level.alpha + level.sigma) / (self.alpha(time) + self.sigma(time))

    def velocity(self, t: Times, x0: Tensor, eps: Tensor) -> Tensor:
        """u = E[d alpha x0 + d sigma eps | x], towards noise.  x0, eps: [rows, ...] beside t, [] or [rows]."""
        signal, noise = self.slopes(t)
        return weighted(signal, x0) + weighted(noise, eps)

    def split(self, t: Times, latents: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) from the velocity at latents: the solution of x = alpha x0 + sigma eps and of `velocity`."""
        alpha, sigma = self.level(t)
        signal, noise = self.slopes(t)
        determinant = signal * sigma - noise * alpha
        x0 = weighted(sigma / determinant, velocity) - weighted(noise / determinant, latents)
        return x0, weighted(signal / determinant, latents) - weighted(alpha / determinant, velocity)

    def score(self, t: Times, eps: Tensor) -> Tensor:
        """The gradient of the log density at time t, -eps / sigma."""
        return weighted(-1 / self.sigma(t), eps)


@dataclass(frozen=True)
class Polynomial(Path):
    """alpha = (1 - t)^power, sigma = 1 - alpha."""

    power: float = 2.0

    def alpha(self, t: Times) -> Times:
        return (1 - t) ** self.power

    def sigma(self, t: Times) -> Times:
        return 1 - (1 - t) ** self.power

    def slopes(self, t: Times) -> tuple[Times, Times]:
        slope = self.power * (1 - t) ** (self.power - 1)
        return -slope, slope

    def time(self, ratio: Times) -> Times:
        return 1 - (1 / (1 + 1 / ratio)) ** (1 / self.power)  # so that an infinite ratio is time 0


@dataclass(frozen=True)
class Linear(Path):
    """alpha = 1 - t, sigma = t: what flow models are trained on; t is diffusers' sigma and u its model's output."""

    def alpha(self, t: Times) -> Times:
        return 1 - t

    def sigma(self, t: Times) -> Times:
        return t

    def slopes(self, t: Times) -> tuple[Times, Times]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time(self, ratio: Times) -> Times:
        return 1 / (1 + ratio)


@dataclass(frozen=True)
class VariancePreserving(Path):
    """alpha = exp(-T / 2), sigma^2 = 1 - exp(-T) with T = t^2 (beta_max - beta_min) / 2 + t beta_min.

    At t = 1 there is signal left: alpha is 0.0066.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def elapsed(self, t: Times) -> Times:
        """T, the integral of beta."""
        return t**2 * (self.beta_max - self.beta_min) / 2 + t * self.beta_min

    def alpha(self, t: Times) -> Times:
        return (-self.elapsed(t) / 2).exp()

    def sigma(self, t: Times) -> Times:
        return (-torch.expm1(-self.elapsed(t))).sqrt()

    def slopes(self, t: Times) -> tuple[Times, Times]:
        alpha, sigma = self.alpha(t), self.sigma(t)
        beta = t * (self.beta_max - self.beta_min) + self.beta_min
        return -beta / 2 * alpha, beta * alpha**2 / (2 * sigma)

    def time(self, ratio: Times) -> Times:
        spread = self.beta_max - self.beta_min
        return ((self.beta_min**2 + 2 * spread * torch.log1p(ratio**-2)).sqrt() - self.beta_min) / spread


PathName = Literal["linear", "vp", "polynomial"]


def path_named(name: str, power: float = 2.0) -> Path:
    """The path called "linear", "vp" or "polynomial" (of this power)."""
    return {"linear": Linear(), "vp": VariancePreserving(), "polynomial": Polynomial(power)}[name]


# How much noise g(t) the reverse-time SDE adds: any g >= 0 keeps the marginals.  Each is multiplied by a norm.

Diffusion = Literal["square", "linear", "constant", "sigma", "sin", "clipping", "exp", "tan"]
"""Names of `DIFFUSIONS`."""


DIFFUSIONS: dict[str, Callable[[Path, Times], Times]] = {
    "square": lambda path, t: t**2,
    "linear": lambda path, t: t,
    "constant": lambda path, t: torch.ones_like(t),
    "sigma": lambda path, t: path.sigma(t),
    "sin": lambda path, t: (math.pi / 2 * t).sin(),
    "clipping": lambda path, t: (2 * (t - 0.5)).clamp_min(0),  # no noise in the second half
    "exp": lambda path, t: (-(((t - 1) / 0.1) ** 2)).exp(),
    "tan": lambda path, t: (math.pi / 2 * t.clamp(max=0.95)).tan(),
}
"""Diffusion coefficients g(t) of a path, by name."""
