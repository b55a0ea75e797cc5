"""What a scheduler knows: the levels it steps through, and what the denoiser's output means at each.

The network behind a pipeline sees latents of one path, with signal a and noise b: variance-preserving (a^2 + b^2 = 1,
time in training steps) or linear (a + b = 1, time in proportion to b).  A latent of any other path is brought there by
its scale alone, because (x0, eps) do not depend on the path.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffusion.lookahead import training_times
from diffusion.particles import Level, weighted
from mmaccel.methods import Unsupported

Prediction = Literal["epsilon", "v_prediction", "sample", "original_sample", "flow"]


@dataclass(frozen=True)
class Schedule:
    """The levels and times of one run.

    grid: [steps + 1], on the scheduler's own path; each step ends where the next begins.  times: the scheduler's own at
    each step, [steps].  table: noise b at each training time, [times], for a variance-preserving network; None for a
    linear one.  clip: what x0 is clipped to; eps is then what leads there, as with use_clipped_model_output.
    """

    grid: Level
    times: Float64[Tensor, "steps"]
    prediction: Prediction
    table: Float64[Tensor, "training"] | None
    training: int
    clip: float | None = None

    def network_level(self, level: Level) -> tuple[Tensor, Level]:
        """The scale between a latent and what the network sees, and the level it has there."""
        scale = level.alpha + level.sigma if self.table is None else torch.hypot(level.alpha, level.sigma)
        return scale, Level(level.alpha / scale, level.sigma / scale)

    def time(self, noise: Float64[Tensor, "rows"]) -> Float64[Tensor, "rows"]:
        """What the network is told when it sees latents with this much noise b: the scheduler's own time where the
        noise is on its grid, else what lies between."""
        own = self.network_level(self.grid)[1].sigma[:-1]
        distance, nearest = (noise[:, None] - own).abs().min(1)
        if self.table is None:
            between = noise * self.training
        else:
            between = torch.from_numpy(np.interp(noise, self.table, np.arange(len(self.table))))
        return torch.where(distance < 1e-7, self.times[nearest], between)

    def estimates(self, latents: Float[Tensor, "rows *shape"], level: Level, output: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) from the output of the network for latents of its own path."""
        a, b = level
        if self.prediction == "flow":
            x0, eps = latents - weighted(b, output), latents + weighted(a, output)
        elif self.prediction == "v_prediction":
            x0 = weighted(a, latents) - weighted(b, output)
            eps = weighted(a, output) + weighted(b, latents)
        elif self.prediction in ("sample", "original_sample"):
            x0, eps = output, weighted(1 / b, latents - weighted(a, output))
        else:
            x0, eps = weighted(1 / a, latents - weighted(b, output)), output
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
            eps = weighted(1 / b, latents - weighted(a, x0))
        return x0, eps

    def below(self, level: Level, count: int) -> Level:
        """Levels of the network's path from `level` down at even distances, the first is `level`: [count], or fewer
        where there are fewer training times."""
        noise = self.network_level(level)[1].sigma
        if self.table is None:
            sigma = noise * torch.arange(count, 0, -1, dtype=torch.float64) / count
            return Level(1 - sigma, sigma)
        (time,) = self.time(noise[None]).round().long().tolist()
        sigma = self.table[torch.tensor([start for start, _ in training_times(time, count)])]
        return Level((1 - sigma.square()).sqrt(), sigma)


IN_LOOP = {
    "DDIMScheduler": "variance-preserving",
    "CogVideoXDDIMScheduler": "variance-preserving",
    "DDPMScheduler": "variance-preserving",
    "EulerDiscreteScheduler": "variance-exploding",
    "EulerAncestralDiscreteScheduler": "variance-exploding",
    "FlowMatchEulerDiscreteScheduler": "linear",
}
"""Schedulers whose steps need nothing but the latents and their level."""

CLIPS = {"DDIMScheduler", "DDPMScheduler"}
"""Those that mean their setting `clip_sample`."""

ADDED_NOISE = {"DDPMScheduler": 1.0, "EulerAncestralDiscreteScheduler": 1.0}
"""eta of those that always add noise; the others take it from the call, or add none."""


REFUSED = {
    "thresholding": (True, "its estimates are clipped by quantiles of the sample"),
    "stochastic_sampling": (True, "it draws its noise itself"),
    "invert_sigmas": (True, "its levels run the other way"),
    "timestep_type": ("continuous", "its times are no training times"),
    "variance_type": (("learned", "learned_range"), "the denoiser says how much noise to add"),
}
"""Settings that a search within the sampling does not reproduce, and why."""


def check_step(scheduler: Any) -> None:
    """Raises Unsupported for a scheduler whose step needs more than the denoiser's output, the time and the latents."""
    parameters = inspect.signature(scheduler.step).parameters.values()
    needed = [
        each.name for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    if more := [name for name in needed if name not in ("model_output", "timestep", "sample")]:
        name = type(scheduler).__name__
        raise Unsupported(
            f"the step of {name} needs {', '.join(more)} of the pipeline's earlier steps, which a search has not; take "
            f"another scheduler of its kind ({name.replace('DPM', 'DDIM')})"
        )


def check_scheduler(scheduler: Any) -> None:
    """Raises Unsupported for a scheduler that samples cannot branch under, naming one that works."""
    name, config = type(scheduler).__name__, scheduler.config
    if name not in IN_LOOP:
        flow = "flow" in str(config.get("prediction_type")) or config.get("use_flow_sigmas") or name.startswith("Flow")
        mend = "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"
        raise Unsupported(
            f"{name} remembers earlier steps or takes several at once, which is wrong once samples branch; a search "
            f"within the sampling needs one of {', '.join(IN_LOOP)}. Set pipe.scheduler = "
            f"{mend}.from_config(pipe.scheduler.config), or search over whole samples with BestOfN or ZeroOrderSearch"
        )
    for setting, (refused, why) in REFUSED.items():
        given = config.get(setting)
        if given == refused or (isinstance(refused, tuple) and given in refused):
            raise Unsupported(
                f"{name} with {setting}={given!r} cannot be searched within the sampling: {why}. Set pipe.scheduler = "
                f"{name}.from_config(pipe.scheduler.config, {setting}=...), or search over whole samples with BestOfN"
            )
    if config.get("prediction_type", "flow") not in get_args(Prediction):
        raise Unsupported(
            f"{name} with prediction_type={config['prediction_type']!r} is not known here; known are "
            f"{', '.join(get_args(Prediction))}"
        )


def schedule_of(scheduler: Any, first: int = 0) -> Schedule:
    """The schedule of a scheduler whose times are set; `first` is the step at which a run begins.

    Raises Unsupported for a scheduler that remembers earlier steps, naming one that works.
    """
    check_scheduler(scheduler)
    name, config = type(scheduler).__name__, scheduler.config
    kind = IN_LOOP[name]
    times = scheduler.timesteps.double().cpu()[first:]
    training = int(config.num_train_timesteps)
    if kind != "variance-preserving":
        sigma = scheduler.sigmas.double().cpu()[first : first + len(times) + 1]
    if kind == "linear":
        return Schedule(Level(1 - sigma, sigma), times, "flow", None, training)
    signal = scheduler.alphas_cumprod.double().cpu()
    table = (1 - signal).sqrt()
    clip = float(config.clip_sample_range) if name in CLIPS and config.clip_sample else None
    if kind == "variance-exploding":
        return Schedule(Level(torch.ones_like(sigma), sigma), times, config.prediction_type, table, training)
    last = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0)).double().reshape(1)
    squared = torch.cat([signal[times.round().long()], last])
    grid = Level(squared.sqrt(), (1 - squared).clamp_min(0).sqrt())
    return Schedule(grid, times, config.prediction_type, table, training, clip)
