"""A token as the end of a Markov chain of Gaussian steps, and densities of whole trajectories.

x_T ~ N(0, 1), x_{t-1} = m_t(x_t) + s_t(x_t) e_t for t = T..1, and the token is x_0.  In code, a step has the index
t - 1: chains run from index T - 1 down to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor


class Draws(Protocol):
    """Random numbers, one independent block for every row."""

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, [rows, *shape]."""

    def uniform(self) -> Float64[Tensor, "rows"]:
        """Numbers in [0, 1)."""

    def at(self, rows: Int[Tensor, "chosen"]) -> Self:
        """For the chosen rows, which may repeat."""


@dataclass(frozen=True)
class Gaussians:
    """Independent normal laws of the entries of tensors: mean and std broadcast to [..., size]."""

    mean: Float[Tensor, "*batch size"]
    std: Float[Tensor, "*batch size"]

    def log_density(self, value: Float[Tensor, "*batch size"]) -> Float64[Tensor, "*batch"]:
        """The log density of vectors, summed over their entries in float64."""
        mean, std = self.mean.double(), self.std.double()
        return -(((value.double() - mean) / std) ** 2 / 2 + std.log() + math.log(2 * math.pi) / 2).sum(-1)

    def at(self, rows: Tensor) -> Gaussians:
        """The laws of the chosen rows, the last batch axis."""
        return Gaussians(self.mean[..., rows, :], self.std[..., rows, :])


class Chain(Protocol):
    """The laws of the steps of one token a row."""

    @property
    def steps(self) -> int:
        """How many."""

    @property
    def size(self) -> int:
        """Numbers in a token."""

    @property
    def noisy_end(self) -> bool:
        """Whether the last step, of index 0, draws noise; if not, a trajectory has no density."""

    @property
    def fixed(self) -> Float[Tensor, "3 steps"]:
        """What does not depend on the state, by index: the weights of a state, and of the clean token that it foresees,
        in the mean of the step from it, and the step's std."""

    def __call__(self, states: Float[Tensor, "levels rows size"], indices: Int[Tensor, "levels"]) -> Gaussians:
        """The law of the state after the step of each index, from the states before it, in one batched call."""

    def at(self, rows: Int[Tensor, "chosen"]) -> Self:
        """The chain of the chosen rows, which may repeat."""


@dataclass(frozen=True)
class Walk:
    """A trajectory of every row, and the laws that its steps were drawn from, in the order of time.

    states: [steps + 1, rows, size], from x_T to x_0.  laws: of states[1:].
    """

    states: Float[Tensor, "levels rows size"]
    laws: Gaussians

    @property
    def token(self) -> Float[Tensor, "rows size"]:
        """Where the trajectory ends."""
        return self.states[-1]

    @property
    def last(self) -> Gaussians:
        """The law that the token was drawn from, given the trajectory before it."""
        return Gaussians(self.laws.mean[-1], self.laws.std[-1])

    def log_density(self) -> Float64[Tensor, "rows"]:
        """The trajectory's log density given x_T, by the laws that it was drawn from."""
        return self.laws.log_density(self.states[1:]).sum(0)

    def at(self, rows: Tensor) -> Walk:
        """The chosen rows."""
        return Walk(self.states[:, rows], self.laws.at(rows))


def walk(chain: Chain, draws: Draws) -> Walk:
    """Draws a trajectory of every row.  Costs `steps` calls of the chain, one after the other."""
    size = chain.size
    return walk_along(chain, [draws.normal(size)], lambda: draws.normal(size))


def same_noise(chain: Chain, other: Walk) -> Walk:
    """The trajectory that this chain makes of the noise that drove another chain's: trajectory alignment.

    Source: arXiv:2411.11925, section 3.2.  A step without noise (the last one, of published samplers) has none to pass
    on, and is drawn without here, too.
    """
    noise = (other.states[1:] - other.laws.mean) / other.laws.std
    return walk_along(chain, [other.states[0]], iter(noise).__next__)


def walk_along(chain: Chain, states: list[Tensor], noise: Callable[[], Tensor]) -> Walk:
    """The trajectory from states[0] under the noise of successive steps."""
    means, stds, steps, noisy_end = [], [], chain.steps, chain.noisy_end
    indices = torch.arange(steps - 1, -1, -1)
    for step in range(steps):
        law = chain(states[-1][None], indices[step : step + 1])
        means.append(law.mean[0])
        stds.append(law.std.expand_as(law.mean)[0])
        noisy = step + 1 < steps or noisy_end
        states.append(means[-1] + stds[-1] * noise() if noisy else means[-1])
    return Walk(torch.stack(states), Gaussians(torch.stack(means), torch.stack(stds)))


def walk_on(
    chain: Chain, start: Float[Tensor, "rows size"], at: Int[Tensor, "rows"], noise: Float[Tensor, "steps rows size"]
) -> Walk:
    """Trajectories that go on from these states, after `at` steps of each, to their ends.

    noise: of all steps.  The walk starts with the least of `at`; rows that have come further wait in their states.
    """
    first = int(at.min())
    indices = torch.arange(chain.steps - 1 - first, -1, -1)
    states, laws = [start], []
    for step in range(first, chain.steps):
        laws.append(chain(states[-1][None], indices[step - first : step - first + 1]))
        moved = laws[-1].mean[0] + laws[-1].std[0] * noise[step]
        states.append(torch.where((at <= step)[:, None], moved, states[-1]))
    mean, std = (torch.cat([getattr(law, name) for law in laws]) for name in ("mean", "std"))
    return Walk(torch.stack(states), Gaussians(mean, std))


def sweep_on(
    chain: Chain,
    start: Float[Tensor, "rows size"],
    at: Int[Tensor, "rows"],
    noise: Float[Tensor, "steps rows size"],
    sweeps: int,
) -> Walk:
    """As `walk_on`, of another law: all steps at once, `sweeps` times, each time at the states of the time before.

    Picard iteration, on the clean token that a state foresees: at first the same for all steps, that of the start; then
    what the chain foresees at the states which followed.  A step's foresight depends on the noise of earlier steps
    alone, so its law, given those, is Gaussian, and known, as `laws` has it; it nears the chain's own as sweeps go on.
    Costs `sweeps` + 1 calls, one after the other, whatever the chain's steps.
    """
    first, row = int(at.min()), torch.arange(len(start), device=start.device)
    indices = torch.arange(chain.steps - 1 - first, -1, -1)
    keeps, reveals, stds = (part[..., None, None] for part in chain.fixed[:, indices.to(chain.fixed.device)].to(start))
    begun = (torch.arange(first, chain.steps, device=at.device)[:, None] >= at)[..., None]
    later = torch.ones(len(indices), len(indices), dtype=torch.bool, device=start.device).triu(1)
    carried = torch.where(later, keeps[:, 0, 0], 1.0).cumprod(1).triu().T  # a step's move, in the states behind it
    shocks, reach = begun * stds * noise[first:], keeps.cumprod(0) * start

    def moved(clean: Tensor) -> tuple[Tensor, Tensor]:
        added = torch.where(begun, clean, (1 - keeps) * start)
        after = reach + (carried @ (added + shocks).flatten(1)).view_as(added)
        return added, torch.cat([start[None], after])

    levels, which = torch.unique(at.clamp_max(chain.steps - 1), return_inverse=True)
    step = levels[which] - first
    mean = chain(start.expand(len(levels), *start.shape), chain.steps - 1 - levels).mean[which, row]
    added, states = moved(reveals * ((mean - keeps[step, 0] * start) / reveals[step, 0]))
    for _ in range(sweeps):
        added, states = moved(chain(states[:-1], indices).mean - keeps * states[:-1])
    return Walk(states, Gaussians(keeps * states[:-1] + added, stds.expand_as(added)))


def reread(chain: Chain, states: Float[Tensor, "levels rows size"]) -> Gaussians:
    """The laws of this chain's steps at another's states, in one batched call: [steps, rows, size]."""
    return chain(states[:-1], torch.arange(chain.steps - 1, -1, -1))


def log_density(chain: Chain, states: Float[Tensor, "levels rows size"]) -> Float64[Tensor, "rows"]:
    """The log density, under this chain, of trajectories given where they start.  One batched call of the chain."""
    return reread(chain, states).log_density(states[1:]).sum(0)
