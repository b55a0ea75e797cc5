"""Particle filters: samples that run together, weighted by what they promise, resampled towards the promising.

Sources: FK steering (arXiv:2501.06848), the SMC baseline of arXiv:2503.19385, entropic annealing and look-ahead
modulation of ePF (arXiv:2510.05825).

A filter steers towards paths in proportion to exp(lambda r_final): after every acting step i a path is worth a target
Lambda_i, the log of the product of its potentials so far, and Lambda_final = lambda r_final whatever the potential.
What resampling has already acted on is paid; log w = Lambda_i - paid.  So nothing is lost when a step does not
resample, the difference potential telescopes exactly, and a broken reward in between spoils no sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float64
from torch import Tensor

from diffusion.annealing import Rule, temperature
from diffusion.lookahead import look_ahead
from diffusion.particles import Particles
from diffusion.problem import Problem, seed_of
from diffusion.resampling import SCHEMES, Scheme, effective_sample_size, uniform_numbers
from diffusion.sampler import Sampler, SteppingSearch, check
from diffusion.search import Rounds
from diffusion.steps import ode

Potential = Literal["difference", "max", "sum", "reward"]

LARGEST_RELEASED = math.log(1e10)
"""The released code clamps weights here, so that everything above is equal; log weights need no clamp."""


def remembered(
    rewards: Float64[Tensor, "particles"], stored: Float64[Tensor, "particles"], potential: Potential
) -> Float64[Tensor, "particles"]:
    """rho: what a path remembers of its rewards.  max and sum run along the path, the others keep the latest."""
    if potential == "max":
        return torch.maximum(rewards, stored)
    return rewards + stored if potential == "sum" else rewards


def targets(
    rewards: Float64[Tensor, "particles"],
    stored: Float64[Tensor, "particles"],
    before: Float64[Tensor, "particles"],
    potential: Potential,
    weight: float,
    final: bool,
) -> Float64[Tensor, "particles"]:
    """Lambda: the log of the product of a path's potentials, this step's included.

    difference: lambda r, which its sum telescopes to.  Else: Lambda before + lambda rho.  At the end of all: lambda r.
    rewards, stored: of this step and rho, `remembered`.  before: Lambda at the acting step before, 0 at first.
    """
    if final or potential == "difference":
        return weight * rewards
    return before + weight * stored


def released_targets(
    rewards: Float64[Tensor, "particles"],
    stored: Float64[Tensor, "particles"],
    earlier: Float64[Tensor, "particles"],
    paid: Float64[Tensor, "particles"],
    potential: Potential,
    weight: float,
    final: bool,
) -> Float64[Tensor, "particles"]:
    """Lambda as the released code of FK steering has it, so that log w = Lambda - paid are its weights.

    It forgets the weight of a step that did not resample (Lambda starts from what is paid), and ends max and sum on rho
    in place of the final reward.  stored, earlier: rho after and before this step.
    """
    if potential == "difference":
        return paid + weight * (rewards - earlier)
    return weight * stored if final else paid + weight * stored


@dataclass(frozen=True)
class ParticleFilter(SteppingSearch):
    """Run particles together and resample them in proportion to exp(weight reward).

    particles: how many.
    weight: lambda, which multiplies the reward; larger is greedier.  Where SMC and SVDD write exp(r / beta), it is
        1 / beta.
    potential: what an acting step weighs by: the "difference" to the last reward, the "max" or "sum" of the path's
        rewards, or the "reward" itself.
    resample_below: resample when the effective sample size falls below this share of the particles, in (0, 1]; weights
        are carried over otherwise.  1 is always, unless all weights are equal.
    resampling: "systematic", "stratified", "residual" or "multinomial", see `diffusion.resampling`.
    start, every, end: the steps that act are start, start + every, ... <= end, counted from 0, and the last; end None
        is the last.  Decodes and rewards are spent at acting steps only.
    anneal: temper early, lopsided weights by the "ess", "entropy" or "base" rule, see `diffusion.annealing`.
    look_ahead: weigh particles for resampling by what they will be one deterministic step on, estimated with this many
        evaluations; 0 weighs them by what they are.  An auxiliary particle filter.
    path, times, diffusion, norm, power, eta: how steps are made, see `diffusion.sampler.SteppingSearch`; FK steering's
        paper has path="pipeline" and eta=1.
    released: the arithmetic of FK steering's released code with its defects, to reproduce its traces.
    Costs particles steps evaluations, and particles look_ahead more at each acting step but the last.

    Where we differ.  From FK steering's code: steps that do not resample keep their weights; max and sum are corrected
    at the end to the final reward; log weights in float64, no clamp at 1e10; rewards have no floor (its 0 makes max
    blind to negative ones); ancestors are drawn when the rewards are known and then make their step, so that siblings
    never share a latent and a reward belongs to its latent.  From SMC's code: the result is the final particle of the
    highest reward, where the code resamples once more and compares ratios.  From ePF: tempering keeps the ratio that
    makes it unbiased; look-ahead, which the paper names and its code leaves out, is the standard auxiliary filter.
    Every choice of settings but `released` is unbiased: softmax of the finalists' extra["log_weight"] estimates means
    under the sampler's distribution tilted by exp(weight reward).

    A reward that is not a number weighs nothing, unless that is true of all.
    """

    name: ClassVar[str] = "particle-filter"

    particles: int = 4
    weight: float = 10.0
    potential: Potential = "difference"
    resample_below: float = 0.5
    resampling: Scheme = "systematic"
    start: int = 0
    every: int = 1
    end: int | None = None
    anneal: Rule | None = None
    look_ahead: int = 0
    released: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        end = self.start if self.end is None else self.end
        rules = (None, *get_args(Rule))
        check(
            (self.particles >= 1, self.particles, "particles is at least 1"),
            (
                0 < self.weight < math.inf,
                self.weight,
                "weight multiplies the reward and is above 0 (exp(r / beta) is 1 / beta; to not steer, use BestOfN)",
            ),
            (self.potential in get_args(Potential), self.potential, f"potential is one of {get_args(Potential)}"),
            (0 < self.resample_below <= 1, self.resample_below, "resample_below is a share, in (0, 1] (1 is always)"),
            (self.resampling in SCHEMES, self.resampling, f"resampling is one of {', '.join(SCHEMES)}"),
            (self.start >= 0, self.start, "start, the first step that acts, is at least 0"),
            (self.every >= 1, self.every, "every, the distance of steps that act, is at least 1"),
            (end >= self.start, self.end, f"end, the last step that acts, is not before start={self.start!r}"),
            (self.anneal in rules, self.anneal, f"anneal is one of {rules}"),
            (self.look_ahead >= 0, self.look_ahead, "look_ahead counts evaluations and is at least 0"),
            (
                not self.released or (self.anneal is None and not self.look_ahead),
                (self.anneal, self.look_ahead),
                "the released arithmetic knows neither anneal nor look_ahead: leave them at None and 0",
            ),
        )

    @property
    def chooses(self) -> bool:
        return self.particles > 1

    def acts(self, number: int, steps: int) -> bool:
        """Whether step `number` of `steps` weighs the particles."""
        end = steps - 1 if self.end is None else self.end
        return number == steps - 1 or (self.start <= number <= end and (number - self.start) % self.every == 0)

    def search(self, problem: Problem) -> Rounds:
        sampler = self.sampler(problem)
        count = len(sampler.steps)
        if self.start >= count:
            raise ValueError(
                f"the filter first acts at step start={self.start}, counted from 0, but the run has {count} steps; "
                f"take more steps, or a start of at most {count - 1}"
            )
        particles = self.begun(problem.start(self.particles, sampler.levels.at(0)))
        for number in range(count - 1):
            particles = problem.denoise(particles)
            if self.acts(number, count):
                particles = self.weighed(problem.scored(particles), final=False)
                particles = self.resampled(problem, particles, sampler, number)
            particles = problem.propose(particles, sampler.steps[number], at=number)
            yield (number + 1) / count
        particles = self.weighed(problem.scored(particles), final=True)
        if self.released:
            particles = self.resampled(problem, particles, sampler, count - 1)
        finalists = replace(problem.finished(particles), reward=particles.reward).best()
        yield 1.0
        return finalists

    def begun(self, particles: Particles) -> Particles:
        """Particles that have no history: rho, Lambda, what is paid, and log w."""
        nothing = torch.zeros(len(particles), dtype=torch.float64)
        lowest = torch.full_like(nothing, -torch.inf)
        stored = lowest if self.potential == "max" and not self.released else nothing
        extra = {"stored": stored, "target": nothing, "paid": nothing, "log_weight": nothing}
        return replace(particles, extra=extra)

    def weighed(self, particles: Particles, final: bool) -> Particles:
        """Scored particles with their log weights."""
        assert particles.reward is not None
        rewards, extra = particles.reward, particles.extra
        stored = remembered(rewards, extra["stored"], self.potential)
        settings = (self.potential, self.weight, final)
        if self.released:
            target = released_targets(rewards, stored, extra["stored"], extra["paid"], *settings)
            log_weight = (target - extra["paid"]).nan_to_num(-torch.inf, neginf=-torch.inf).clamp(max=LARGEST_RELEASED)
        else:
            target = targets(rewards, stored, extra["target"], *settings)
            log_weight = target - extra["paid"]
        return replace(particles, extra={**extra, "stored": stored, "target": target, "log_weight": log_weight})

    def resampled(self, problem: Problem, particles: Particles, sampler: Sampler, number: int) -> Particles:
        """The particles themselves, or as many drawn among them, who paid for the draw with their log weights.

        The draw is proportional to exp(bet): bet = log w, or what one more step would make of it, over a temperature.
        """
        count = len(sampler.steps)
        bet = particles.extra["log_weight"]
        if self.look_ahead:
            bet = self.promised(problem, particles, sampler, number)
        below = 0.5 if number == count - 1 else self.resample_below  # at the end, only the released code comes here
        if effective_sample_size(bet) >= below * len(particles):
            return particles
        if self.anneal:
            bet = bet / temperature(bet, (number + 1) / count, self.anneal)
        if (bet == -torch.inf).all():
            bet = torch.zeros_like(bet)
        uniforms = uniform_numbers(len(particles), seed_of(problem.host.seed, -1, number))
        ancestors = SCHEMES[self.resampling](bet, uniforms)
        chosen = replace(particles, extra={**particles.extra, "paid": particles.extra["paid"] + bet}).gather(ancestors)
        log_weight = chosen.extra["target"] - chosen.extra["paid"]
        return replace(chosen, extra={**chosen.extra, "log_weight": log_weight})

    def promised(self, problem: Problem, particles: Particles, sampler: Sampler, number: int) -> Tensor:
        """The log weights that the particles would have one deterministic step on, were that the next acting step."""
        after = problem.propose(particles, ode(sampler.levels.at(number + 1)), at=number)
        _, estimate = look_ahead(problem, after, self.look_ahead)
        count = len(sampler.steps)
        final = not any(self.acts(later, count) for later in range(number + 1, count - 1))
        return self.weighed(problem.scored(estimate, estimate.latents), final).extra["log_weight"]
