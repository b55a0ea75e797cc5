"""Search over the initial noise: sampling is a black box from noise to a scored sample.

Source: "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps" (arXiv:2501.09732), sections 3 and
4, in the form of sayakpaul/tt-scale-flux, which its first author reviewed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion.particles import Key, Particles, concatenate
from diffusion.problem import Problem
from diffusion.resampling import accept_first
from diffusion.search import Rounds, Search


def neighbour(
    pivot: Float[Tensor, "rows *shape"], gaussian: Float[Tensor, "rows *shape"], cosine: float
) -> Float[Tensor, "rows *shape"]:
    """A noise of the pivot's norm, at the given cosine to it, in the direction of `gaussian`; row by row.

    n = |p| (c u + sqrt(1 - c²) w), u = p / |p|, w the unit vector of gaussian - (gaussian . u) u.  A row is one vector,
    channels and frames together.  Computed in float64; the result has the pivot's dtype.  c = 1 gives the pivot.
    """
    flat, directions = (values.to(torch.float64).flatten(1) for values in (pivot, gaussian))
    norm = flat.norm(dim=1, keepdim=True)
    u = flat / norm
    across = directions - (directions * u).sum(dim=1, keepdim=True) * u
    w = across / across.norm(dim=1, keepdim=True)
    near: Tensor = norm * (cosine * u + math.sqrt(1 - cosine**2) * w)
    return near.reshape(pivot.shape).to(pivot.dtype)


@dataclass(frozen=True)
class _NoiseSearch(Search):
    """What the two searches share: rounds of whole samples, within a budget.

    nfe: the most denoiser rows that a search may spend; None is whatever its rounds take.  A last round is cut short.
    """

    nfe: int | None = field(default=None, kw_only=True)

    @property
    def limit(self) -> int | None:
        return self.nfe

    def scored_samples(self, problem: Problem, noises: Particles) -> Particles:
        """The noises' samples with their rewards."""
        samples = problem.sample(noises)
        return problem.scored(samples, samples.latents)


def affordable(problem: Problem, wanted: int, least: int = 0) -> int:
    """How many whole samples the budget has room for, at most `wanted`.

    Raises ValueError, naming the smallest budget that works, if it has no room for `least`.
    """
    left = problem.evaluations_left
    if left is None:
        return wanted
    room = left // problem.steps
    if room < least:
        cost = problem.steps * problem.host.rows_per_evaluation
        raise ValueError(
            f"nfe={left * problem.host.rows_per_evaluation} has room for {room} samples of {cost} denoiser rows each, "
            f"and this search needs at least {least}: give it nfe={least * cost} or more, or take fewer steps"
        )
    return min(wanted, room)


@dataclass(frozen=True)
class RandomSearch(_NoiseSearch):
    """Fresh noises in rounds, twice as many each round; keep the best sample of all.

    rounds: round j = 1..R samples 2^j noises, 2^(R+1) - 2 in all; the first is the pipeline's own.
    Source: tt-scale-flux, whose report names the best of the last round only; ours is the best of all rounds.
    Finalists are the rounds' winners.
    """

    name: ClassVar[str] = "random-search"

    rounds: int = 4

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds is at least 1, which samples 2 noises; got {self.rounds!r}")
        _check_nfe(self.nfe)

    def search(self, problem: Problem) -> Rounds:
        winners: list[Particles] = []
        drawn, least = 0, 1
        total = affordable(problem, 2 ** (self.rounds + 1) - 2, least)
        for number in range(1, self.rounds + 1):
            count = affordable(problem, 2**number)
            if not count:
                break
            samples = self.scored_samples(problem, problem.start(count, first=drawn))
            winners.append(samples.best(1))
            drawn += count
            yield drawn / total
        return concatenate(winners).best()


@dataclass(frozen=True)
class ZeroOrderSearch(_NoiseSearch):
    """Walk over initial noises: sample neighbours of a pivot noise, and the best neighbour becomes the pivot.

    neighbours: how many, each round.  rounds: how many rounds.
    cosine: between a neighbour and its pivot; the norm is the pivot's, so neighbours stay on the Gaussian's shell.
    on_failure: what happens when no neighbour is strictly better than the pivot: "restart" from a fresh noise
        (tt-scale-flux), "stay" and try other neighbours, or "shrink": stay, and halve the angle.
    Costs (1 + rounds neighbours) steps evaluations, and steps more for every restart that a round follows.

    Source: arXiv:2501.09732, zero-order search, in tt-scale-flux's form, which reads the paper's 0.95 as a cosine.
    We differ: the pivot's score is kept, not computed again each round; the best sample ever seen is returned, also
    when it was the pivot of a rejected round, which the released code forgets; neighbours are drawn from seeds and can
    be replayed.  Decisions are the released code's.  Finalists are the pivots that won a round or began a walk.
    """

    name: ClassVar[str] = "zero-order-search"

    neighbours: int = 4
    rounds: int = 4
    cosine: float = 0.95
    on_failure: Literal["restart", "stay", "shrink"] = "restart"

    def __post_init__(self) -> None:
        if self.neighbours < 1 or self.rounds < 1:
            raise ValueError(
                f"neighbours and rounds are at least 1; got neighbours={self.neighbours!r}, rounds={self.rounds!r}"
            )
        if not 0 <= self.cosine < 1:
            raise ValueError(
                f"cosine, between a neighbour and its pivot, lies in [0, 1); got {self.cosine!r}. "
                "At 1 a neighbour is its pivot; at 0 it has nothing of it but the norm. The paper's is 0.95"
            )
        if self.on_failure not in ("restart", "stay", "shrink"):
            raise ValueError(f'on_failure is "restart", "stay" or "shrink"; got {self.on_failure!r}')
        _check_nfe(self.nfe)

    def search(self, problem: Problem) -> Rounds:
        affordable(problem, 2, least=2)
        noises, pivot = problem.start(1), None  # noises: the pivot's; pivot: its sample, None until it was scored
        cosine, walks = self.cosine, 1
        finalists: list[Particles] = []
        for number in range(self.rounds):
            fresh = pivot is None
            count = affordable(problem, self.neighbours + fresh) - fresh
            if count < 1:  # a pivot alone is no round
                break
            around = self.around(problem, noises, number, count, cosine)
            samples = self.scored_samples(problem, concatenate([noises, around]) if fresh else around)
            if fresh:
                pivot, samples = samples.gather([0]), samples.gather(range(1, count + 1))
                finalists.append(pivot)
            assert pivot is not None and pivot.reward is not None and samples.reward is not None
            best = int(samples.reward.argsort(descending=True, stable=True)[0])
            if accept_first(samples.reward[[best]], float(pivot.reward)) is not None:
                noises, pivot = around.gather([best]), samples.gather([best])
                finalists.append(pivot)
            elif self.on_failure == "restart":
                noises, pivot, walks = problem.start(1, first=walks), None, walks + 1
            elif self.on_failure == "shrink":
                cosine = math.cos(math.acos(cosine) / 2)
            yield (number + 1) / self.rounds
        return concatenate(finalists).best()

    def around(self, problem: Problem, noises: Particles, number: int, count: int, cosine: float) -> Particles:
        """`count` neighbours of one noise.  Rounds count down from -1 in the keys: no step's noise is used twice."""
        chain = noises.trails[0].chain
        keys: list[Key] = [(-1 - number, chain, candidate) for candidate in range(count)]
        copies = noises.repeat(count)
        gaussian = torch.cat([problem.host.draw(key) for key in keys]).to(copies.latents)
        trails = tuple(
            replace(trail, turns=(*trail.turns, (cosine, key))) for trail, key in zip(copies.trails, keys, strict=True)
        )
        return replace(copies, latents=neighbour(copies.latents, gaussian, cosine), trails=trails)


def _check_nfe(nfe: int | None) -> None:
    if nfe is not None and nfe < 1:
        raise ValueError(f"nfe, the most denoiser rows to spend, is at least 1; got {nfe!r}. For no limit pass None")
