"""A host without a model: data of a Gaussian, whose denoiser, marginals and flow have closed forms on every path."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion.particles import Key, Level, weighted
from diffusion.problem import Problem, normal, seed_of
from mmaccel.ledger import Ledger


def linear_grid(steps: int) -> Level:
    """Levels of a flow model: sigma = 1, ..., 0 at even distances, alpha = 1 - sigma."""
    sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return Level(1 - sigma, sigma)


def cumulative_alphas() -> Tensor:
    """The product of 1 - beta over 1000 training steps, betas even from 1e-4 to 0.02: DDPM's."""
    return (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


def diffusion_grid(steps: int) -> Level:
    """Levels of a diffusion model under DDIM with leading spacing, which ends clean."""
    times = torch.arange(steps - 1, -1, -1) * (1000 // steps)
    products = torch.cat([cumulative_alphas()[times], torch.ones(1, dtype=torch.float64)])
    return Level(products.sqrt(), (1 - products).sqrt())


class GaussianHost:
    """Samples of N(mean, std^2) in every entry.

    reward: of clean latents, [rows, *shape] -> [rows]; by default minus the mean square distance to `target`.
    guidance: (scale, mean of the unconditional data), then an evaluation costs two rows.
    initials, draws: noises to use instead of seeded ones, [chains, *shape] and a function of the key.
    rows, calls, scored: what went through the denoiser and the reward, counted from outside.
    """

    def __init__(
        self,
        grid: Level | None = None,
        *,
        mean: float | Tensor = 0.5,
        std: float = 0.7,
        shape: Sequence[int] = (4, 2),
        target: float = 1.5,
        reward: Callable[[Tensor], Tensor] | None = None,
        eta: float = 0.0,
        guidance: tuple[float, float | Tensor] | None = None,
        initials: Tensor | None = None,
        draws: Callable[[Key], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.grid = linear_grid(10) if grid is None else grid
        self.mean, self.std, self.shape, self.eta, self.guidance = mean, std, tuple(shape), eta, guidance
        self.reward = reward or (lambda clean: -((clean - target) ** 2).flatten(1).mean(dim=1))
        self.initials, self.draws, self.seed = initials, draws, seed
        self.rows_per_evaluation = 1 if guidance is None else 2
        self.rows = self.calls = self.scored = 0
        self.ledger = Ledger()

    def problem(self, nfe: int | None = None, rows_per_call: int | None = None) -> Problem:
        """The problem of this host, with a ledger that holds at most `nfe` denoiser rows."""
        self.ledger = Ledger({} if nfe is None else {"denoiser_rows": nfe})
        return Problem(self, self.ledger, rows_per_call)

    def initial(self, chain: int) -> Tensor:
        if self.initials is not None:
            return self.initials[chain : chain + 1]
        return normal((1, *self.shape), seed_of(self.seed, chain))

    def draw(self, key: Key) -> Tensor:
        if self.draws is not None:
            return self.draws(key).reshape(1, *self.shape)
        return normal((1, *self.shape), seed_of(self.seed, *key))

    def denoise(self, latents: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        self.rows += len(latents) * self.rows_per_evaluation
        self.calls += 1
        x0, eps = self.posterior(latents, level, self.mean)
        if self.guidance is not None:
            scale, unconditional = self.guidance
            other_x0, other_eps = self.posterior(latents, level, unconditional)
            x0, eps = other_x0 + scale * (x0 - other_x0), other_eps + scale * (eps - other_eps)
        return x0, eps

    def posterior(self, latents: Tensor, level: Level, mean: float | Tensor) -> tuple[Tensor, Tensor]:
        """E[x0|x] and E[eps|x] of data N(mean, std^2)."""
        alpha, sigma = level
        variance = alpha**2 * self.std**2 + sigma**2
        offset = latents - weighted(alpha, torch.as_tensor(mean).to(latents).expand_as(latents))
        return mean + weighted(alpha * self.std**2 / variance, offset), weighted(sigma / variance, offset)

    def flow(self, latents: Tensor, level: Level) -> Tensor:
        """Where the probability flow takes latents that lie at `level`, []: the clean end of their ODE."""
        deviation = (level.alpha**2 * self.std**2 + level.sigma**2).sqrt()
        return self.mean + self.std / float(deviation) * (latents - float(level.alpha) * self.mean)

    def sample(self, latents: Tensor, chains: Sequence[int]) -> Tensor:
        for step in range(len(self.grid.sigma) - 1):
            x0, eps = self.denoise(latents, self.grid.at(step).rows(len(latents)))
            alpha, sigma = self.grid.at(step + 1)
            latents = weighted(alpha, x0) + weighted(sigma, eps)
        return latents

    def rewards(self, latents: Tensor) -> Tensor:
        self.scored += len(latents)
        with self.ledger.spend("reward_calls", len(latents)):
            values = self.reward(latents).double()
        return values.masked_fill(~values.isfinite(), -torch.inf)

    def times_below(self, level: Level, count: int) -> Level:
        """Even sigmas on the linear path."""
        time = level.sigma / (level.alpha + level.sigma) * torch.arange(count, 0, -1, dtype=torch.float64) / count
        return Level(1 - time, time)


class DiffusionHost(GaussianHost):
    """The same on the levels of a diffusion model with 1000 training steps."""

    def times_below(self, level: Level, count: int) -> Level:
        from diffusion.lookahead import training_times

        products = cumulative_alphas()
        now = int((products - level.alpha**2 / (level.alpha**2 + level.sigma**2)).abs().argmin())
        below = products[[start for start, _ in training_times(now, count)]]
        return Level(below.sqrt(), (1 - below).sqrt())
