"""Search over paths: noise the best samples again, and sample on from there.

Source: Ma et al., "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps" (arXiv:2501.09732),
section 3.2; released for flows with arXiv:2503.19385, section 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from diffusion.particles import Particles
from diffusion.paths import Linear
from diffusion.problem import Problem, Rewards
from diffusion.resampling import best_of_each, top
from diffusion.sampler import check
from diffusion.search import Rounds, Search
from diffusion.steps import ode, renoise

Keep = Literal["best of all", "per chain"]


def survivors(rewards: Rewards, chains: int, keep: Keep) -> Int64[Tensor, "chains"]:
    """Which of chains x copies go on: as many as there are chains, the best of all or the best of each."""
    if keep == "best of all":
        return top(rewards, chains)
    copies = len(rewards) // chains
    return torch.arange(chains) * copies + best_of_each(rewards.reshape(chains, copies))


@dataclass(frozen=True)
class SearchOverPaths(Search):
    """Noise the kept samples again by `forward`, sample them on by `backward`, and keep the best, until they are clean.

    chains: N, kept.  candidates: M, noisy copies of each.
    start, forward, backward: times of the linear path, in [0, 1]: a run from pure noise down to `start`, then rounds of
        `forward` up and `backward` down, ceil(start / (backward - forward)) of them.
    ode_steps: S, deterministic steps of each run down, at even times.
    keep: the N best of all N M copies (the paper), or the best copy "per chain" (the code of arXiv:2503.19385).
    Costs N S (1 + M rounds) evaluations; the pipeline's own number of steps does not matter.
    A copy is worth the reward of its posterior mean at the last time it is evaluated, before it reaches its end.
    """

    name: ClassVar[str] = "search-over-paths"

    chains: int = 2
    candidates: int = 5
    forward: float = 0.78
    backward: float = 0.81
    start: float = 0.12
    ode_steps: int = 10
    keep: Keep = "best of all"

    def __post_init__(self) -> None:
        check(
            (self.chains >= 1, self.chains, "chains is at least 1"),
            (self.candidates >= 1, self.candidates, "candidates, the noisy copies of each chain, is at least 1"),
            (self.ode_steps >= 1, self.ode_steps, "ode_steps of each run down is at least 1"),
            (0 < self.start < 1, self.start, "start, the time of the first candidates, lies between 0 and 1"),
            (
                0 < self.forward < self.backward,
                (self.forward, self.backward),
                "forward is above 0 and backward above forward, or the samples never get clean",
            ),
            (
                self.start + self.forward <= 1,
                (self.start, self.forward),
                "start + forward, the noisiest time, is at most 1",
            ),
            (self.keep in ("best of all", "per chain"), self.keep, 'keep is "best of all" or "per chain"'),
        )

    @property
    def rounds(self) -> int:
        """How often copies are made."""
        return math.ceil(self.start / (self.backward - self.forward) - 1e-9)

    def search(self, problem: Problem) -> Rounds:
        kept = problem.start(self.chains)
        here = float(Linear().meet(problem.grid.at(0))[0])
        kept = self.down(problem, kept, here, self.start)
        yield 1 / (1 + self.rounds * self.candidates)
        here = self.start
        for number in range(self.rounds):
            up = here + self.forward
            copies = problem.propose(kept, renoise(Linear().level(here), Linear().level(up)), number, self.candidates)
            here = max(up - self.backward, 0.0)
            copies = problem.scored(self.down(problem, copies, up, here))
            assert copies.reward is not None
            kept = copies.gather(survivors(copies.reward, self.chains, self.keep))
            yield (1 + (number + 1) * self.candidates) / (1 + self.rounds * self.candidates)
        return replace(problem.finished(kept), reward=kept.reward).best()

    def down(self, problem: Problem, particles: Particles, above: float, below: float) -> Particles:
        """Evaluates `particles` at even times from `above` on, `ode_steps` times, the last a step before `below`.

        The step to `below` is left to whatever comes next: it is part of re-noising, and of finishing.
        """
        times = torch.linspace(above, below, self.ode_steps + 1, dtype=torch.float64)
        for time in times[1:-1]:
            particles = problem.propose(particles, ode(Linear().level(time)), at=0)
        return problem.denoise(particles)
