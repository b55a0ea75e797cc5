"""pi0: a vision-language model reads pictures and words, and an expert beside it denoises a chunk of actions.

Source: Black et al., "pi0: A Vision-Language-Action Flow Model for General Robot Control" (arXiv:2410.24164); the class
is transformers' `PI0ForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mmaccel.methods import Unsupported
from robotics.branches import HorizonGate, Repeated, sample_by_horizon
from robotics.episodes import acting_for
from robotics.horizons import ByHorizon
from robotics.observations import Observation
from robotics.policies import Inputs, Places, Policy, cameras_of, same


class PI0Policy(Policy):
    """transformers' `PI0ForConditionalGeneration`.

    prepare: makes the arguments of `sample_actions` of an observation: `PI0Inputs(processor)`, or your own.
    dims: numbers of an action that the robot has; the model's others are padding.
    steps: denoising steps; the model's own number by default.  units: turns the model's units into the robot's.
    gate: for a model that was trained with several horizons.
    """

    stochastic, pads = True, True

    def __init__(
        self,
        model: nn.Module,
        prepare: Callable[[Observation], Mapping[str, Any]],
        *,
        cameras: tuple[str, ...],
        dims: int,
        execute: int | None = None,
        steps: int | None = None,
        units: Callable[[Tensor], Tensor] = same,
        gate: HorizonGate | None = None,
    ) -> None:
        if not is_pi0(model):
            raise Unsupported(
                f"PI0Policy takes transformers' PI0ForConditionalGeneration; got {type(model).__name__}. "
                "Models that decode action tokens: ActionTokenPolicy; lerobot's policies: LerobotPolicy"
            )
        config: Any = model.config
        super().__init__(model, prepare, cameras=cameras, dims=dims, horizon=int(config.chunk_size), execute=execute)
        self.steps, self.units, self.gate = steps, units, gate
        if gate is not None:
            gate.check(self.horizon)
            self.horizons = gate.horizons

    def draw(self, inputs: Inputs, samples: int, generator: torch.Generator | None) -> Tensor:
        config: Any = self.model.config
        state: Tensor = inputs.model["state"]
        shape = len(inputs.rows), samples, self.horizon, int(config.max_action_dim)
        device = state.device if generator is None else generator.device
        return torch.randn(shape, generator=generator, dtype=state.dtype, device=device).to(state.device)

    def decide(self, inputs: Inputs, noise: Tensor | None) -> Float[Tensor, "rows horizon dims"]:
        actions = self.model.sample_actions(**inputs.model, noise=noise, num_steps=self.steps)  # type: ignore[operator]
        return self.units(actions[..., : self.dims])

    def decide_all(self, inputs: Inputs, noise: Tensor) -> Float[Tensor, "rows samples horizon dims"]:
        samples = noise.shape[1]
        with Repeated(self.model, samples):
            actions = self.decide(inputs, noise.flatten(0, 1))
        return rearrange(actions, "(rows samples) horizon dims -> rows samples horizon dims", samples=samples)

    def by_horizon(
        self, inputs: Inputs, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> ByHorizon:
        if self.gate is None:
            return super().by_horizon(inputs)
        drawn = self.draw(inputs, 1, generator)[:, 0] if noise is None else noise
        with acting_for(inputs.acting), torch.no_grad():
            return sample_by_horizon(self.model, self.gate, self.dims, lambda: self.decide(inputs, drawn))

    def places(self, inputs: Inputs) -> Places:
        config: Any = self.model.config
        visual = inputs.model["input_ids"] == config.vlm_config.image_token_id
        return Places(cameras_of(visual, inputs.acting.shown), "suffix", self.horizon, between=1)


class PI0Inputs:
    """What transformers' `PI0Processor` makes of an observation, on the model's device.

    The state is normalised with the processor's own statistics.
    """

    def __init__(self, processor: Any, cameras: tuple[str, ...], device: torch.device | str = "cpu") -> None:
        self.processor, self.cameras, self.device = processor, cameras, device

    def __call__(self, observation: Observation) -> Mapping[str, Any]:
        """The arguments of `sample_actions`."""
        shown = observation.shown(self.cameras)
        if not bool((shown.int().diff(dim=-1) <= 0).all()):
            raise ValueError(
                f"the processor takes the first cameras of {', '.join(self.cameras)} and pads the last; got a row in "
                "which an earlier one is padded: put those that are always there first"
            )
        images = [
            [observation.images[name][row] for name, there in zip(self.cameras, own.tolist(), strict=True) if there]
            for row, own in enumerate(shown)
        ]
        made = self.processor(
            images=images,
            text=list(observation.instruction),
            state=observation.state,
            images_kwargs={"do_rescale": False},
            text_kwargs={"padding": True, "max_length": None},  # its fixed length counts picture tokens
            return_tensors="pt",
        )
        return {name: value.to(self.device) for name, value in made.items()}


def is_pi0(model: Any) -> bool:
    """Whether this is transformers' pi0, by what its class offers."""
    config = getattr(model, "config", None)
    return getattr(config, "model_type", None) == "pi0" and hasattr(model, "sample_actions")
