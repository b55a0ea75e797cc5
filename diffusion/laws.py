"""The laws of searches, held against the plain pipeline: `mmaccel check` holds them on the user's own checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion.best_of_n import BestOfN
from diffusion.problem import Problem
from diffusion.schedules import ADDED_NOISE, IN_LOOP
from diffusion.search import Rounds, Search
from diffusion.steps import ode
from mmaccel.api import applied
from mmaccel.checks import LawResult

BARS = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""How far pixels in 0..1 may differ, for two orders of summation in the model's own precision."""
SEED = 20250
STEPS = 4


@dataclass(frozen=True)
class Walk(Search):
    """The pipeline's own levels by deterministic steps of ours: it has to end where the plain pipeline does."""

    name: ClassVar[str] = "walk"

    def search(self, problem: Problem) -> Rounds:
        particle = problem.start(1)
        for number in range(1, problem.steps + 1):
            particle = problem.propose(particle, ode(problem.grid.at(number)), at=0)
            yield number / problem.steps
        return problem.scored(particle, particle.latents)


def mean(images: Tensor, prompts: Any, **context: Any) -> Tensor:
    """A reward that needs nothing: the mean of the pixels."""
    return images.flatten(1).mean(dim=1)


def example(pipeline: Any) -> dict[str, Any]:
    """The arguments of a short call."""
    from mmaccel import pocket

    folder = str(getattr(pipeline.config, "_name_or_path", ""))
    name = next((name for name in pocket.names() if folder.endswith(name)), None)
    defaults = pocket.call_defaults(name) if name else {}
    return {"prompt": "a red square left of a blue circle", **defaults, "num_inference_steps": STEPS}


def search_laws(search: Search, pipeline: Any, inputs: Mapping[str, Any]) -> Iterator[LawResult]:
    """The laws, one after the other: the mechanism's with searches of its own, then the given search's."""
    arguments = {name: value for name, value in inputs.items() if name != "generator"} | {"output_type": "pt"}
    bar = BARS.get(next(iter(pipeline.vae.parameters())).dtype, 1e-3) if hasattr(pipeline, "vae") else 1e-3

    def called(seed: int = SEED) -> Tensor:
        return torch.as_tensor(pipeline(**arguments, generator=torch.Generator().manual_seed(seed))[0]).float()

    def apart(first: Tensor, second: Tensor) -> float:
        return float((first - second).abs().max())

    plain = called()
    with applied(pipeline, BestOfN(mean, 1)):
        yield LawResult("with nothing to choose it is the plain pipeline", apart(called(), plain), 0.0)
    with applied(pipeline, BestOfN(mean, 2)) as run:
        best = called()
    (seed, *_) = [finalist["seed"] for finalist in run.report.to_dict()["finalists"]]
    yield LawResult("the winner of two is the plain pipeline's sample of its seed", apart(best, called(seed)), bar)
    name = type(pipeline.scheduler).__name__
    if name in IN_LOOP and name not in ADDED_NOISE:
        with applied(pipeline, Walk(mean)):
            yield LawResult("deterministic steps end where the plain pipeline does", apart(called(), plain), bar)
    with applied(pipeline, dataclasses.replace(search, pictures=0)) as run:
        first, again = called(), called()
        limit = search.limit
        over = 0 if limit is None else max(0, run.report["denoiser_rows"] - limit)
    yield LawResult("the same seed gives the same sample", apart(first, again), bar)
    yield LawResult("it spends no more rows than it may", over, 0)
    yield LawResult("the pipeline comes back as it was", apart(called(), plain), 0.0)
