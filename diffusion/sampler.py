"""How the searches that steer single steps sample: which levels, and which noisy steps between them.

A flow sampled as a diffusion has three choices: the path that its latents lie on, the times at which it is asked, and
how much noise g(t) each step adds.  Source: arXiv:2503.19385, section 4.  Or one takes the pipeline's own levels, with
DDIM's noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch

from diffusion.particles import Level, Step
from diffusion.paths import DIFFUSIONS, Diffusion, Path, PathName, Times, path_named
from diffusion.problem import Problem
from diffusion.search import Search
from diffusion.steps import ddim, euler_maruyama
from mmaccel.methods import Unsupported

TimesName = Literal["uniform", "sqrt", "pipeline"]


class Sampler(NamedTuple):
    """The levels of a run, [steps + 1], and the step from each to the next.

    The model is asked at every level but the last, which is clean or nearly so.
    """

    levels: Level
    steps: tuple[Step, ...]

    def step(self, numbers: Sequence[int]) -> Step:
        """The steps of these numbers, [rows]."""
        p, q, s = (torch.stack([getattr(self.steps[number], name) for number in numbers]) for name in "pqs")
        return Step(p, q, s, self.levels.at(torch.tensor(numbers) + 1))


def times_of(name: TimesName, path: Path, grid: Level) -> Times:
    """Times on `path`, [steps + 1], descending to 0, for as many steps as `grid` has.

    "sqrt": sqrt(1 - (i / steps)^2), small steps at first and large ones at last.  "uniform": 1 - i / steps.
    "pipeline": where the noise is as strong as on the grid.  None starts noisier than the grid does.
    """
    own = path.time(grid.alpha / grid.sigma).clamp(0, 1)
    if name == "pipeline":
        return own
    share = torch.linspace(0, 1, len(own), dtype=torch.float64)
    return own[0] * ((1 - share**2).sqrt() if name == "sqrt" else 1 - share)


def check(*expectations: tuple[bool, object, str]) -> None:
    """Raises ValueError for the first (good, value, expected) that is not good."""
    for good, value, expected in expectations:
        if not good:
            raise ValueError(f"{expected}; got {value!r}")


@dataclass(frozen=True)
class SteppingSearch(Search):
    """Base class of the searches that choose between noisy steps.

    path: "vp", "linear" or "polynomial" (of `power`), a path of its own; or "pipeline": the pipeline's own levels, by
        DDIM steps with `eta`, None being the pipeline's own.
    times: at which a path is sampled, as many as the pipeline has steps: "uniform", "sqrt" (the paper's; searches only
        above sigma = 0.7 of a flow at 10 steps), or "pipeline", as noisy as the pipeline itself would be.
    diffusion, norm: how noisy the steps are.  "ddim" makes DDIM steps with eta = norm, whose noise is right however
        long they are; the others are Euler-Maruyama steps of the reverse SDE with g(t) = norm times a function of this
        name in `diffusion.paths`.
    The paper's are path="vp", times="sqrt", diffusion="square", norm=3.0.
    """

    path: Literal["vp", "linear", "polynomial", "pipeline"] = field(default="vp", kw_only=True)
    times: TimesName = field(default="uniform", kw_only=True)
    diffusion: Diffusion | Literal["ddim"] = field(default="ddim", kw_only=True)
    norm: float = field(default=1.0, kw_only=True)
    power: float = field(default=2.0, kw_only=True)
    eta: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        paths = (*get_args(PathName), "pipeline")
        check(
            (self.path in paths, self.path, f"path is one of {', '.join(paths)}"),
            (self.times in get_args(TimesName), self.times, f"times is one of {', '.join(get_args(TimesName))}"),
            (
                self.diffusion in ("ddim", *DIFFUSIONS),
                self.diffusion,
                f"diffusion is one of ddim, {', '.join(DIFFUSIONS)}",
            ),
            (self.norm >= 0, self.norm, "norm, which multiplies g(t), is at least 0"),
            (self.power >= 1, self.power, "power, the polynomial path's, is at least 1 (1 is the linear path)"),
            (
                self.eta is None or self.eta >= 0,
                self.eta,
                "eta is at least 0 (1 is DDPM's noise); None is the pipeline's own",
            ),
        )

    def sampler(self, problem: Problem) -> Sampler:
        """The levels and steps of a run.

        Raises Unsupported if no step adds noise although there is to be something to choose.
        """
        count = problem.steps
        if self.path == "pipeline":
            eta = problem.host.eta if self.eta is None else self.eta
            levels = problem.grid
            steps = [ddim(levels.at(number), levels.at(number + 1), eta) for number in range(count)]
            mend = 'pass eta=1.0 for DDPM\'s noise, or path="vp"'
        else:
            path = path_named(self.path, self.power)
            times = times_of(self.times, path, problem.grid)
            levels = path.level(times)
            steps = [self.step(path, times[number], times[number + 1]) for number in range(count)]
            mend = "give norm a value above 0"
        if self.chooses and not any(step.s > 0 for step in steps[:-1]):
            raise Unsupported(
                f"{self.name} chooses between noisy steps, and on the path {self.path!r} none of the "
                f"{count - 1} steps before the last adds noise: all candidates would be the same; {mend}"
            )
        return Sampler(levels, tuple(steps))

    def step(self, path: Path, now: Times, to: Times) -> Step:
        """The step between two times of a path."""
        if self.diffusion == "ddim":
            return ddim(path.level(now), path.level(to), self.norm)
        return euler_maruyama(path, now, to, self.norm * DIFFUSIONS[self.diffusion](path, now))
