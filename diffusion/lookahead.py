"""The lookahead estimator: what a noisy latent will become, by a short deterministic run instead of one step.

Source: "Inference-Time Text-to-Video Alignment with Diffusion Latent Beam Search" (arXiv:2501.19252), section 4.
"""

from __future__ import annotations

from itertools import pairwise

from diffusion.particles import Particles
from diffusion.problem import Problem
from diffusion.steps import ode


def training_times(now: int, count: int) -> list[tuple[int, int]]:
    """The (from, to) of each step of a lookahead that starts at training time `now`: floor(now j / count) for j down.

    Steps that rounding makes empty are left out, so there are fewer than `count` of them where `now` is below it.
    """
    times = [now * place // count for place in range(count, -1, -1)]
    return [pair for pair in pairwise(times) if pair[0] > pair[1]] or [(now, 0)]


def look_ahead(problem: Problem, particles: Particles, count: int) -> tuple[Particles, Particles]:
    """(the particles with what the denoiser saw in them, their clean estimates) by `count` evaluations of each.

    The particles lie at one level.  The first evaluation is of the particles themselves, and they keep it: their next
    step asks for nothing.  `count` 1 is the posterior mean E[x0|x]; many reach the end of the deterministic flow.
    """
    particles = problem.denoise(particles)
    walker = particles
    below = problem.host.times_below(particles.level.at(0), count)
    for index in range(1, len(below.sigma)):
        walker = problem.propose(walker, ode(below.at(index)), at=0)
    return particles, problem.finished(walker)
