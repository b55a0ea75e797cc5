"""CoDe: blockwise control of sampling, the best of several continuations of each chain after every block of steps.

Source: Singh et al., "CoDe: Blockwise Control for Denoising Diffusion Models" (arXiv:2502.00968), algorithm 1; with a
flow's stochastic steps in arXiv:2503.19385, section 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from diffusion.problem import Problem
from diffusion.resampling import best_of_each
from diffusion.sampler import Sampler, SteppingSearch, check
from diffusion.search import Rounds

Choice = Callable[[Float64[Tensor, "chains candidates"], int], Int64[Tensor, "chains"]]
"""Which candidate of each chain goes on, by their rewards at the level of that number."""


def blocks(steps: int, block: int) -> list[range]:
    """The steps of each block.  The last step leads to the posterior mean, is no one's choice, and is left out."""
    return [range(first, min(first + block, steps - 1)) for first in range(0, steps - 1, block)]


def search_blocks(
    problem: Problem, sampler: Sampler, chains: int, candidates: int, block: int, choose: Choice
) -> Rounds:
    """Of every chain, runs `candidates` continuations through each block of steps, and one of them goes on.

    A candidate is worth the reward of its posterior mean where its block ends.  Finalists are the chains' last ones.
    """
    steps = len(sampler.steps)
    kept = problem.start(chains, sampler.levels.at(0))
    rows = [(chain, candidate) for chain in range(chains) for candidate in range(candidates)]
    for block_steps in blocks(steps, block):
        walkers = problem.denoise(kept).repeat(candidates)
        for number in block_steps:
            walkers = problem.propose(walkers, sampler.steps[number], at=number, slots=rows)
            walkers = problem.denoise(walkers)
        walkers = problem.scored(walkers)
        assert walkers.reward is not None
        choice = choose(walkers.reward.reshape(chains, candidates), block_steps.stop)
        kept = walkers.gather(torch.arange(chains) * candidates + choice)
        yield block_steps.stop / steps
    if kept.reward is None:  # a run of one step has no block
        kept = problem.scored(kept)
    finalists = replace(problem.finished(kept), reward=kept.reward).best()
    yield 1.0
    return finalists


@dataclass(frozen=True)
class BlockwiseSearch(SteppingSearch):
    """Base class of the searches that now and then go on with one of several continuations of each chain.

    chains: B, independent.  candidates: K, continuations of each.
    """

    chains: int = 2
    candidates: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            (self.chains >= 1, self.chains, "chains is at least 1"),
            (self.candidates >= 1, self.candidates, "candidates, the continuations of each chain, is at least 1"),
        )

    @property
    def chooses(self) -> bool:
        return self.chains > 1 or self.candidates > 1


@dataclass(frozen=True)
class CoDe(BlockwiseSearch):
    """After every block of noisy steps, go on with the best of several continuations of each chain.

    chains: B, independent.  candidates: K, continuations of each.  block: L, steps between two choices; SVDD has 1.
    path, times, diffusion, norm, power, eta: how steps are made, see `diffusion.sampler.SteppingSearch`.
    Costs B + B K (T - 1) evaluations in T steps and B K rewards a block; the released code evaluates each chain's
    first level K times, not once.
    """

    name: ClassVar[str] = "code"

    block: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check((self.block >= 1, self.block, "block, the steps between two choices, is at least 1"))

    def search(self, problem: Problem) -> Rounds:
        settings = (self.chains, self.candidates, self.block)
        return search_blocks(
            problem, self.sampler(problem), *settings, choose=lambda rewards, number: best_of_each(rewards)
        )
