"""Diffusion latent beam search: keep the noisy latents that promise the best samples.

Source: Oshima et al., "Inference-Time Text-to-Video Alignment with Diffusion Latent Beam Search", NeurIPS 2025
(arXiv:2501.19252), algorithm 1 and section 4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from diffusion.lookahead import look_ahead
from diffusion.particles import Particles
from diffusion.problem import Problem
from diffusion.sampler import check
from diffusion.search import Rounds, Search
from diffusion.steps import ddim
from mmaccel.methods import Unsupported


@dataclass(frozen=True)
class LatentBeamSearch(Search):
    """Keep the best of the noisy latents at every step, judged by a short deterministic look ahead.

    beams: B, latents kept.  candidates: K, noisy successors of each.  beams=1 is greedy search.
    lookahead: L, evaluations that judge a candidate; 1 is its posterior mean, the paper recommends 6.
    eta: noise of a step relative to DDPM's; None is the pipeline's own.
    search_range: (high, low), the part of the run in which candidates compete, as shares of the steps still to come;
        (1.0, 0.0) is all.  Outside, every beam goes on alone, with the noise that the pipeline itself adds.
    reuse: take a candidate's first lookahead evaluation for its next step, which it is; False pays for it again, as the
        released code does.
    Costs B + (T - 1) B K L evaluations in T steps, searching all of them; B T + (T - 1) B K L without reuse.

    Where we differ from the released code: steps are DDIM's on any path, so flows are searched, too; the posterior
    means of the last step are scored once, not K times; outside the search range no beam is lost, and eta is the
    pipeline's.  Its range asks for low <= t / 1000 < high, which is ours where times are evenly spaced.
    Candidates of equal reward keep their order, by beam and then by candidate; a reward that is no number loses.
    """

    name: ClassVar[str] = "latent-beam-search"

    beams: int = 4
    candidates: int = 2
    lookahead: int = 6
    eta: float | None = None
    search_range: tuple[float, float] = (1.0, 0.0)
    reuse: bool = True

    def __post_init__(self) -> None:
        high, low = self.search_range
        check(
            (self.beams >= 1, self.beams, "beams, the latents kept, is at least 1"),
            (self.candidates >= 1, self.candidates, "candidates, the successors of each beam, is at least 1"),
            (self.lookahead >= 1, self.lookahead, "lookahead is at least 1, the posterior mean"),
            (
                self.eta is None or self.eta >= 0,
                self.eta,
                "eta is at least 0 (1 is DDPM's noise); None is the pipeline's own",
            ),
            (1 >= high > low >= 0, self.search_range, "search_range is (high, low) with 1 >= high > low >= 0"),
        )

    @property
    def chooses(self) -> bool:
        return self.beams > 1 or self.candidates > 1

    def searches(self, number: int, steps: int) -> bool:
        """Whether candidates compete in step `number` of `steps`."""
        high, low = self.search_range
        return low <= (steps - 1 - number) / steps < high

    def search(self, problem: Problem) -> Rounds:
        eta = problem.host.eta if self.eta is None else self.eta
        if eta == 0 and self.candidates > 1:
            raise Unsupported(
                f"{self.candidates} candidates of a deterministic step (eta=0) are all the same; pass eta=1.0, which "
                "adds DDPM's noise, or candidates=1"
            )
        beams, steps = problem.start(self.beams), problem.steps
        for number in range(steps - 1):
            searched = self.searches(number, steps)
            step = ddim(problem.grid.at(number), problem.grid.at(number + 1), eta if searched else problem.host.eta)
            if searched:
                successors = problem.propose(beams, step, at=number, candidates=self.candidates)
                beams = self.judged(problem, successors).best(self.beams)
            else:
                beams = problem.propose(beams, step, at=number)
            yield (number + 1) / steps
        beams = problem.scored(beams)
        finalists = replace(problem.finished(beams), reward=beams.reward).best()
        yield 1.0
        return finalists

    def judged(self, problem: Problem, successors: Particles) -> Particles:
        """The successors with the rewards of their lookahead estimates."""
        seen, estimates = look_ahead(problem, successors, self.lookahead)
        reward = problem.score(estimates.latents, estimates.trails)
        return replace(seen if self.reuse else successors, reward=reward)
