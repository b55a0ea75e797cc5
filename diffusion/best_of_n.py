"""Best-of-N: the baseline that every other search has to beat at equal cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusion.problem import Problem
from diffusion.search import Rounds, Search


@dataclass(frozen=True)
class BestOfN(Search):
    """Sample n times from n initial noises and keep the sample that the reward likes best.

    n: how many samples.  The first is what the pipeline gives without a search.  Equal rewards keep the earlier one.
    Costs n steps evaluations.  The samples come from the pipeline's own scheduler, whichever it is.
    Source: the random search of arXiv:2501.09732, section 3.
    """

    name: ClassVar[str] = "best-of-n"
    whole_samples: ClassVar[bool] = True

    n: int = 4

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n, the number of samples, is at least 1; got {self.n!r}. For no search at all pass n=1")

    @property
    def chooses(self) -> bool:
        return self.n > 1

    def search(self, problem: Problem) -> Rounds:
        samples = problem.sample(problem.start(self.n))
        yield 0.5
        samples = problem.scored(samples, samples.latents)
        yield 1.0
        return samples.best()
