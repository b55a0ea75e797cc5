"""A pipeline's call as a search sees it: how one of its samples is denoised, drawn, decoded and scored."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffusion.denoiser import Call, replayed
from diffusion.guidance import Rule
from diffusion.particles import Key, Level, weighted
from diffusion.problem import Rewards, normal, seed_of
from diffusion.rewards.checking import scored
from diffusion.schedules import ADDED_NOISE, Schedule, schedule_of
from mmaccel.ledger import Ledger
from mmaccel.methods import Unsupported


@dataclass
class Conditions:
    """What the first step of a pipeline's call showed, the same for all of its rows.

    rows: samples that the pipeline makes in this call.  scheduler: as it was before the first step; first: which of its
    steps that was.  rules: how each denoiser's outputs are combined.  boundary: the time from which on downwards the
    second denoiser serves.  told: what the denoiser is told at the scheduler's times.
    """

    networks: dict[str, Callable[..., Any]]
    calls: list[Call]
    rules: dict[str, Rule]
    rows: int
    scheduler: Any
    first: int
    step_arguments: dict[str, Any]
    told: Callable[[Tensor], Tensor]
    boundary: float | None
    latents: Tensor
    model_dtype: torch.dtype

    @cached_property
    def schedule(self) -> Schedule:
        """Levels and times; raises Unsupported if the scheduler cannot be searched within."""
        return schedule_of(self.scheduler, self.first)

    @property
    def times(self) -> Tensor:
        """The scheduler's own times of this run."""
        times: Tensor = self.scheduler.timesteps[self.first :]
        return times

    @property
    def passes(self) -> int:
        """Denoiser rows that a sample costs at each step."""
        return sum(call.passes(self.rows) for call in self.calls)

    def outputs(self, calls: Sequence[Call]) -> list[Tensor]:
        """What the calls were answered, apart by pass: [rows, ...] each."""
        return [part for call in calls for part in call.output.chunk(call.passes(self.rows))]

    def predict(self, row: int, latents: Tensor, times: Tensor) -> Tensor:
        """What the scheduler would get for `latents`, scaled as the denoiser wants them, at `times`, [particles]."""
        if self.boundary is None:
            return self._predict(self.calls[0].denoiser, row, latents, times)
        output = torch.empty_like(latents, dtype=self.model_dtype)
        for denoiser, mine in (("transformer", times >= self.boundary), ("transformer_2", times < self.boundary)):
            if mine.any():
                there = mine.to(latents.device)
                output[there] = self._predict(denoiser, row, latents[there], times[mine])
        return output

    def _predict(self, denoiser: str, row: int, latents: Tensor, times: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for call in self.calls:
            inputs = replayed(call, row, self.rows, latents, times, self.told)
            output = self.networks[denoiser](**inputs)
            output = output if torch.is_tensor(output) else output[0]
            parts += output.to(self.model_dtype).chunk(call.passes(self.rows))
        return self.rules[denoiser].combine(parts)


@dataclass
class PipelineHost:
    """One sample of a pipeline's call: a `diffusion.problem.Host`.

    seed: all of this sample's randomness derives from it.  prepare: initial latents of the pipeline from a generator.
    decode: pictures in [0, 1] from clean latents, [rows, 3, height, width] (videos: frames before 3).
    """

    conditions: Conditions
    row: int
    seed: int
    prompt: str | None
    prepare: Callable[[torch.Generator], Tensor]
    generator: torch.Generator
    decode: Callable[[Tensor], Tensor]
    reward: Callable[..., Any]
    ledger: Ledger

    def __post_init__(self) -> None:
        self.start = self.conditions.latents[self.row : self.row + 1].float()
        self.states = {0: self.generator.get_state()}  # of each chain's generator, once its initial latents are drawn
        self.states_after: dict[int, Tensor] = {}  # likewise, once it was sampled
        self.invalid_rewards = 0

    @property
    def grid(self) -> Level:
        """The pipeline's own levels.  Where only whole samples can be drawn, even ones, which count steps, no more."""
        try:
            return self.conditions.schedule.grid
        except Unsupported:
            sigma = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
            return Level(1 - sigma, sigma)

    @property
    def steps(self) -> int:
        """How many steps the pipeline takes."""
        return len(self.conditions.times)

    @property
    def eta(self) -> float:
        """How much noise the pipeline itself adds in a step."""
        name = type(self.conditions.scheduler).__name__
        return ADDED_NOISE.get(name, float(self.conditions.step_arguments.get("eta") or 0.0))

    @property
    def rows_per_evaluation(self) -> int:
        """2 under classifier-free guidance, else 1."""
        return self.conditions.passes

    def seed_of_chain(self, chain: int) -> int:
        """The seed with which the plain pipeline starts as this chain does."""
        return self.seed if chain == 0 else seed_of(self.seed, chain)

    def initial(self, chain: int) -> Tensor:
        """The chain's initial latents, drawn by the pipeline itself."""
        if chain == 0:
            return self.start.clone()
        generator = torch.Generator(self.generator.device).manual_seed(self.seed_of_chain(chain))
        latents = self.prepare(generator)
        self.states[chain] = generator.get_state()
        return latents.to(self.start)

    def draw(self, key: Key) -> Tensor:
        """Standard normal noise for a key."""
        return normal(self.start.shape, seed_of(self.seed, *key)).to(self.start)

    def denoise(self, latents: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """(x0, eps) from the pipeline's denoisers, with its guidance."""
        schedule = self.conditions.schedule
        scale, seen = schedule.network_level(level)
        inputs = weighted(1 / scale, latents)
        output = self.conditions.predict(self.row, inputs, schedule.time(seen.sigma))
        return schedule.estimates(inputs, seen, output.float())

    def sample(self, latents: Tensor, chains: Sequence[int]) -> Tensor:
        """All steps of a copy of the pipeline's scheduler, in its own dtype."""
        known = self.conditions
        scheduler, arguments = copy.deepcopy(known.scheduler), dict(known.step_arguments)
        generators = [torch.Generator(self.generator.device) for _ in chains]
        for generator, chain in zip(generators, chains, strict=True):
            generator.set_state(self.states[chain])
        if "generator" in inspect.signature(scheduler.step).parameters:
            arguments["generator"] = generators
        latents = latents.to(known.latents.dtype)
        for time in known.times:
            inputs = scheduler.scale_model_input(latents, time) if hasattr(scheduler, "scale_model_input") else latents
            output = known.predict(self.row, inputs, time.expand(len(latents)).cpu())
            latents = scheduler.step(output, time, latents, **arguments, return_dict=False)[0]
        for generator, chain in zip(generators, chains, strict=True):
            self.states_after[chain] = generator.get_state()
        return latents.float()

    def pictures(self, latents: Tensor) -> Tensor:
        """Decodes clean latents: [rows, 3, height, width] in [0, 1]."""
        with self.ledger.spend("decodes", len(latents)):
            return self.decode(latents)

    def rewards(self, latents: Tensor) -> Rewards:
        """Decodes clean latents and scores the pictures."""
        pictures = self.pictures(latents)
        with self.ledger.spend("reward_calls", len(latents)):
            scores = scored(self.reward, pictures, [self.prompt] * len(latents))
        self.invalid_rewards += scores.not_finite
        return scores.values

    def times_below(self, level: Level, count: int) -> Level:
        """Levels for a lookahead: the training times floor(n j / count), or even noise levels of a flow."""
        return self.conditions.schedule.below(level, count)


def with_second_network(rules: dict[str, Rule], scale: float | None) -> dict[str, Rule]:
    """Rules for both networks of a pipeline that changes its denoiser; the second may have a guidance of its own."""
    (rule,) = rules.values()
    return {"transformer": rule, "transformer_2": rule if scale is None else replace(rule, scale=scale)}
