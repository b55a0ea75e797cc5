"""Running a search to its end, and making its finalists again."""

from __future__ import annotations

import torch

from diffusion.particles import Level, Particles, Trail, weighted
from diffusion.search import Search

PAPER = {"times": "sqrt", "diffusion": "square", "norm": 3.0}
"""How arXiv:2503.19385 samples its paths."""


def finished(search: Search, problem) -> Particles:
    """The finalists of a search; its shares of work done ascend to 1."""
    rounds, shares = search.search(problem), []
    while True:
        try:
            shares.append(next(rounds))
        except StopIteration as end:
            assert shares == sorted(shares) and abs(shares[-1] - 1) < 1e-9
            finalists = end.value
            assert (finalists.reward[:-1] >= finalists.reward[1:]).all()
            assert (finalists.level.sigma == 0).all()
            return finalists


def replayed(host, trails: tuple[Trail, ...]) -> torch.Tensor:
    """The latents that these trails lead to, each walked alone by the rule x' = p x0 + q eps + s z."""
    ends = []
    for trail in trails:
        level = host.grid.at(0) if trail.start is None else Level.of(*trail.start)
        latents = host.initial(trail.chain) * float(torch.hypot(*level) / torch.hypot(*host.grid.at(0)))
        for move in trail.moves:
            x0, eps = host.denoise(latents, level.rows(1))
            latents = move.p * x0 + move.q * eps
            if move.noise is not None:
                latents = latents + weighted(torch.tensor(move.s), host.draw(move.noise))
            level = Level.of(move.alpha, move.sigma)
        ends.append(latents)
    return torch.cat(ends)
