"""Rollover budget forcing: every step of a chain has a quota of tries, and tries that a step saves go to the next.

Source: Kim et al., "Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing"
(arXiv:2503.19385), section 5 and algorithm 1, and its released code where they differ.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from diffusion.lookahead import look_ahead
from diffusion.particles import Level, Particles, concatenate
from diffusion.problem import Problem
from diffusion.sampler import Sampler, SteppingSearch, TimesName, check
from diffusion.search import Rounds
from diffusion.steps import ode

TOGETHER = 16  # tries of a chain that go through the model at once, at most: a search may be stopped between them
PAPER = {"chains": 2, "times": "sqrt", "diffusion": "square", "norm": 3.0, "explore": None, "until": 0.0}


@dataclass(frozen=True)
class Account:
    """What a chain has tried.

    step: the transition it is at.  tries: how often it tried that one.  quota: how often it may, with what rolled over.
    record: the best reward of the chain so far.  step_best: the best reward of this transition's tries.
    """

    step: int
    tries: int
    quota: int
    record: float
    step_best: float = -torch.inf


def settle(account: Account, reward: float, share: int, last: int, explore: float | None) -> Account:
    """The account after a try of this reward.  Where it moves on, the chain goes on from the best of its tries.

    A try above the bar moves it on at once, and the next transition gets its share and what is left of this one's
    quota.  A spent quota moves it on with the share alone; the record stays.  At the transition `last` all tries that
    remain are spent.  Equal is not above.
    """
    tries, record = account.tries + 1, max(account.record, reward)
    if account.step < last and reward > bar(account, explore):
        return Account(account.step + 1, 0, account.quota - tries + share, record)
    if account.step < last and tries >= account.quota:
        return Account(account.step + 1, 0, share, record)
    return Account(account.step, tries, account.quota, record, max(account.step_best, reward))


def bar(account: Account, explore: float | None) -> float:
    """What the next try has to beat: the chain's record, or the tries of this transition once enough are explored."""
    if explore is None:
        return account.record
    return account.step_best if account.tries >= int(explore * account.quota) else torch.inf


def undecided(account: Account, last: int, explore: float | None) -> int:
    """How many tries can be made at once, since none but the last of them can move the chain on."""
    if account.step == last:
        return sys.maxsize
    return 1 if explore is None else max(1, int(explore * account.quota) - account.tries)


@dataclass(frozen=True)
class RolloverBudgetForcing(SteppingSearch):
    """Try noisy steps until one is good enough; tries saved at a step roll over to the next.

    nfe: denoiser rows to spend at most, guidance counted.
    chains: B, independent; the paper's are 2.  initial: I, noises that each chain starts from the best of; None is a
        tenth of the budget over the chains, the paper's 25 at nfe=500 with 2.
    explore: when a try moves its chain on.  The paper's rule (None): when it beats all posterior means that the chain
        has seen.  These sharpen from level to level, so the next one beats the record by being less blurred, the more
        so the more steps a model needs: chains rush on, and what they save is spent at the last transition, where
        little can change.  A share in [0, 1] compares tries of one transition alone: when it beats all tries of that
        transition, this share of the quota being tried before.  1 splits the budget evenly, as SVDD does.
    until: the share of the steps that is left when searching ends, in [0, 1): late tries differ in nothing that counts.
        0 searches all transitions, as the paper does.
    finish: evaluations kept back to take each chain from its last searched level to a clean sample, by deterministic
        steps at even noise levels; None is the levels that the pipeline's own grid has there.  0 is the released code,
        which delivers the posterior mean at that level (sigma = 0.7 of a flow at 10 steps): blurred, unless the model
        needs few steps only.
    path, times, diffusion, norm, power, eta: how steps are made, see `diffusion.sampler.SteppingSearch`.
    Spends at most nfe rows, and leaves at most those of B evaluations.

    Where we differ from the released code: `explore`, `until` and `finish`; a chain that has just moved on delivers
    what it moved to, where the code delivers something stale; of tries without a valid reward the first is kept; a
    quota of nothing is refused, where the code divides by zero; noise depends on seed, step, chain and try alone.
    """

    name: ClassVar[str] = "rollover-budget-forcing"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released-code": {**PAPER, "finish": 0},
        "paper": PAPER,
    }

    nfe: int = 500
    chains: int = 1
    initial: int | None = None
    finish: int | None = None
    explore: float | None = 0.6
    until: float = 0.4
    times: TimesName = field(default="pipeline", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            (self.nfe >= 1, self.nfe, "nfe, the denoiser rows to spend, is at least 1"),
            (self.chains >= 1, self.chains, "chains is at least 1"),
            (
                self.initial is None or self.initial >= 1,
                self.initial,
                "initial, the noises that each chain starts from the best of, is at least 1; None is a tenth of nfe",
            ),
            (
                self.finish is None or self.finish >= 0,
                self.finish,
                "finish, the evaluations kept back for each chain, is at least 0; None is the pipeline's own levels",
            ),
            (
                self.explore is None or 0 <= self.explore <= 1,
                self.explore,
                "explore, the share of a transition's quota whose tries only set the bar, lies in [0, 1]; None is the "
                "paper's rule",
            ),
            (0 <= self.until < 1, self.until, "until, the share of the steps left when searching ends, is in [0, 1)"),
        )

    @property
    def limit(self) -> int | None:
        return self.nfe

    def search(self, problem: Problem) -> Rounds:
        if problem.steps < 2:
            raise ValueError(f"{self.name} searches between steps, and needs at least 2 of them; got {problem.steps}")
        sampler, last = self.sampler(problem), self.last(problem.steps)
        ending = self.ending(problem, sampler.levels.at(last + 1))
        budget = self.budget(problem)
        initial = self.initial or max(1, budget // (10 * self.chains))
        left = budget - self.chains * (initial + ending)
        share = left // ((last + 2) * self.chains)
        if share < 1:
            self.refuse(problem, initial, ending, last)

        noises = problem.scored(problem.start(self.chains * initial, sampler.levels.at(0)))
        kept = [noises.gather(range(first, first + initial)).best(1) for first in range(0, len(noises), initial)]
        accounts = [Account(0, 0, share, _reward(particle)) for particle in kept]
        best: list[Particles | None] = [None] * self.chains
        yield 1 - left / budget

        while left > self.chains:
            most = min(TOGETHER, (left - 1) // self.chains)
            count = min(most, *(undecided(account, last, self.explore) for account in accounts))
            tries = self.tried(problem, sampler, kept, accounts, count)
            left -= self.chains * count
            assert tries.reward is not None
            for row, reward in enumerate(tries.reward.tolist()):
                chain = row // count
                found, before = best[chain], accounts[chain]
                if found is None or reward > _reward(found):
                    best[chain] = found = tries.gather([row])
                accounts[chain] = settle(before, reward, share, last, self.explore)
                if accounts[chain].step > before.step:
                    kept[chain], best[chain] = found, None
            yield 1 - left / budget

        ends = [found or particle for found, particle in zip(best, kept, strict=True)]
        finalists = self.finished(problem, ends)
        yield 1.0
        return finalists

    def tried(
        self, problem: Problem, sampler: Sampler, kept: Sequence[Particles], accounts: Sequence[Account], count: int
    ) -> Particles:
        """`count` noisy steps of every chain, each from its own level, with their rewards, chain by chain."""
        slots = [(chain, account.tries + more) for chain, account in enumerate(accounts) for more in range(count)]
        numbers = [accounts[chain].step for chain, _ in slots]
        together = concatenate(kept).gather([chain for chain, _ in slots])
        return problem.scored(problem.propose(together, sampler.step(numbers), at=numbers, slots=slots))

    def finished(self, problem: Problem, ends: Sequence[Particles]) -> Particles:
        """The chains' clean samples with their rewards, best first."""
        if self.finish == 0:
            together = concatenate(ends)
            return replace(problem.finished(together), reward=together.reward).best()
        walked = [self.walked(problem, end) for end in ends]
        clean = concatenate(walked)
        return replace(clean, reward=problem.score(clean.latents, clean.trails)).best()

    def walked(self, problem: Problem, end: Particles) -> Particles:
        """The clean sample that deterministic steps take a particle to."""
        if self.finish is not None:
            return look_ahead(problem, end, self.finish + 1)[1]
        below = levels_below(problem.grid, end.level.at(0))
        for number in range(len(below.sigma)):
            end = problem.propose(end, ode(below.at(number)), at=0)
        return problem.finished(end)

    def last(self, steps: int) -> int:
        """The last transition that is searched."""
        return max(number for number in range(steps - 1) if number == 0 or (steps - 1 - number) / steps >= self.until)

    def ending(self, problem: Problem, level: Level) -> int:
        """The evaluations that taking a chain from its last searched level to clean costs."""
        return len(levels_below(problem.grid, level).sigma) if self.finish is None else self.finish

    def budget(self, problem: Problem) -> int:
        """How many latents may be evaluated."""
        left = problem.evaluations_left
        mine = self.nfe // problem.host.rows_per_evaluation
        return mine if left is None else min(left, mine)

    def refuse(self, problem: Problem, initial: int, ending: int, last: int) -> None:
        """Raises ValueError for a budget that leaves a step of a chain no try, naming the smallest that works."""
        smallest = problem.host.rows_per_evaluation * self.chains * (initial + ending + last + 2)
        raise ValueError(
            f"nfe={self.nfe} leaves no try for some step: {self.chains} chains with {initial} initial noises, "
            f"{last + 1} searched transitions and {ending} evaluations to finish need nfe={smallest} or more; or take "
            "fewer chains, initial noises or steps"
        )


def levels_below(grid: Level, level: Level) -> Level:
    """The levels of the grid that are less noisy than `level` and yet noisy, for their signal."""
    between = (grid.sigma > 0) & (grid.sigma * level.alpha < level.sigma * grid.alpha * (1 - 1e-6))
    return grid.at(between)


def _reward(particle: Particles) -> float:
    assert particle.reward is not None
    return float(particle.reward)
