"""SVDD: soft value-based decoding, one of several noisy successors of each chain goes on at every step.

Source: Li et al., "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding"
(arXiv:2408.08252), algorithm 1 with the posterior mean's reward as the value; for flows arXiv:2503.19385, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusion.blockwise import BlockwiseSearch, search_blocks
from diffusion.problem import Problem, seed_of
from diffusion.resampling import best_of_each, draw, uniform_numbers
from diffusion.sampler import check
from diffusion.search import Rounds


@dataclass(frozen=True)
class SVDD(BlockwiseSearch):
    """At every noisy step, go on with one of several successors of each chain, by the reward of its posterior mean.

    chains: B, independent.  candidates: K, successors of each.
    temperature: a successor goes on with probability softmax(reward / temperature); 0 is the best one, as in the
        released code of arXiv:2503.19385.
    path, times, diffusion, norm, power, eta: how steps are made, see `diffusion.sampler.SteppingSearch`.
    Costs B + B K (T - 1) evaluations in T steps and as many rewards, but for the first B; the released code evaluates
    each chain's first level K times, not once.
    """

    name: ClassVar[str] = "svdd"

    temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check((self.temperature >= 0, self.temperature, "temperature is at least 0 (0 takes the best)"))

    def search(self, problem: Problem) -> Rounds:
        def choose(rewards: Tensor, number: int) -> Tensor:
            if self.temperature == 0:
                return best_of_each(rewards)
            seeds = [seed_of(problem.host.seed, -1, number, chain) for chain in range(self.chains)]
            return draw(rewards / self.temperature, torch.cat([uniform_numbers(1, seed) for seed in seeds]))

        return search_blocks(problem, self.sampler(problem), self.chains, self.candidates, block=1, choose=choose)
