"""A search: a method that spends denoiser evaluations on choosing between samples.

A method's file holds its settings and one function, `search`, which reads like the paper: it moves particles through a
`Problem`, says after every round how far it is, and returns its finalists.  Attaching it to a pipeline is written once,
in `diffusion.pipelines`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffusion.particles import Particles
from diffusion.problem import Problem
from diffusion.rewards.base import RewardField
from mmaccel.attachment import Attachment
from mmaccel.checks import LawResult
from mmaccel.methods import Method

Rounds = Generator[float, None, Particles]
"""Yields the share of the work done, in [0, 1], whenever the search may be stopped; returns finalists, best first."""


@dataclass(frozen=True)
class Search(Method):
    """Base class of the searches.

    reward: what decides, see `diffusion.rewards`.
    rows_per_call: the most latents that go through model, decoder or reward at once; None is all, halved when memory
    runs out.
    pictures: how many finalists' pictures the report keeps, decoded once more, in `report.details["pictures"]`:
    float32 on the CPU, [finalists, 3, height, width] in 0..1 for every sample.
    """

    stages: ClassVar[tuple[str, ...]] = ("denoise",)
    needs_processor: ClassVar[bool] = False
    whole_samples: ClassVar[bool] = False
    """Whether it only draws whole samples, by the pipeline's own scheduler, whichever that is."""

    reward: RewardField
    rows_per_call: int | None = field(default=None, kw_only=True)
    pictures: int = field(default=0, kw_only=True)

    @abstractmethod
    def search(self, problem: Problem) -> Rounds:
        """Searches one prompt's samples; the finalists' latents are clean and carry their rewards."""

    @property
    def chooses(self) -> bool:
        """Whether there is anything to choose; if not, the plain pipeline runs, bit for bit."""
        return True

    @property
    def limit(self) -> int | None:
        """The most denoiser rows that a search of one prompt may spend; None if its settings fix them."""
        return None

    def laws(self, target: Any, inputs: Mapping[str, Any]) -> Iterable[LawResult]:
        """What makes the mechanism and the search right, on this pipeline and these arguments of a call."""
        from diffusion.laws import search_laws

        return search_laws(self, target, inputs)

    def example(self, target: Any, processor: Any) -> dict[str, Any]:
        """A short call of the pipeline."""
        from diffusion.laws import example

        return example(target)

    def attach(self, target: Any, attachment: Attachment) -> None:
        from diffusion.pipelines import decorate

        rows = self.rows_per_call
        if rows is not None and rows < 1:
            raise ValueError(f"rows_per_call, the most latents at once, is at least 1, or None for all; got {rows}")
        if self.pictures < 0:
            raise ValueError(f"pictures, of finalists in the report, are 0 or more; got {self.pictures}")
        decorate(self, target, attachment)
