"""Searches and counters that tests make by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from diffusion.problem import Problem
from diffusion.search import Rounds, Search
from diffusion.steps import ode

COUNTED = ("pos_embed.proj", "time_embedding.linear_1", "timestep_embedder.linear_1", "time_embedder.linear_1")


@dataclass(frozen=True)
class Walk(Search):
    """The pipeline's own levels, one deterministic step each: where the pipeline itself goes without noise."""

    name: ClassVar[str] = "walk"

    chains: int = 1

    @property
    def chooses(self) -> bool:
        return True

    def search(self, problem: Problem) -> Rounds:
        particles = problem.start(self.chains)
        for number in range(1, problem.steps + 1):
            particles = problem.propose(particles, ode(problem.grid.at(number)), at=0)
        yield 1.0
        return problem.scored(particles, particles.latents).best()


@contextmanager
def counted(pipeline: Any) -> Iterator[dict[str, int]]:
    """Rows that really go through the pipeline's denoisers, seen from inside: at a layer that has one row for
    every latent."""
    seen = {"rows": 0}

    def count(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen["rows"] += len(args[0])

    with ExitStack() as undo:
        for name in ("unet", "transformer", "transformer_2"):
            network = getattr(pipeline, name, None)
            if network is not None:
                found = [part for path, part in network.named_modules() if path.endswith(COUNTED)]
                undo.callback(found[0].register_forward_hook(count).remove)
        yield seen
