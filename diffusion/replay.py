"""Making one finalist of an earlier search again, alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffusion.finalists import trail_of
from diffusion.noise_search import neighbour
from diffusion.particles import Level, Step
from diffusion.problem import Problem
from diffusion.search import Rounds, Search


@dataclass(frozen=True)
class Replay(Search):
    """Make a finalist of an earlier search again: its own steps with its own noise, at the cost of one sample.

    trail: the finalist's, as the report says it: `report.to_dict()["finalists"][k]["trail"]`.  Call the pipeline as
    before, with `generator=torch.Generator().manual_seed(trail["seed"])`; another seed is refused.
    """

    name: ClassVar[str] = "replay"

    trail: dict[str, Any]

    def __post_init__(self) -> None:
        if missing := {"seed", "chain", "moves", "turns", "sampled", "start"} - self.trail.keys():
            raise ValueError(
                f'a trail is what a report says under "finalists", with its keys; missing here: '
                f"{', '.join(sorted(missing))}"
            )

    def search(self, problem: Problem) -> Rounds:
        seed, trail = self.trail["seed"], trail_of(self.trail)
        if problem.host.seed != seed:
            raise ValueError(
                f"this finalist comes from seed {seed}, and the pipeline was called with seed {problem.host.seed}; "
                f"pass generator=torch.Generator().manual_seed({seed})"
            )
        level = None if trail.start is None else Level.of(*trail.start)
        particle = problem.start(1, level, first=trail.chain)
        for cosine, key in trail.turns:
            particle = particle.with_latents(neighbour(particle.latents, problem.host.draw(key), cosine))
        if trail.sampled:
            particle = problem.sample(particle)
        for number, (p, q, s, alpha, sigma, noise) in enumerate(trail.moves):
            at, *slot = noise or (0, 0, 0)
            step = Step(*Level.of(p, q), Level.of(s, s).alpha, Level.of(alpha, sigma))
            particle = problem.propose(particle, step, at=at, slots=[(slot[0], slot[1])])
            yield number / len(trail.moves)
        return problem.scored(particle, particle.latents)
