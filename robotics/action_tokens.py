"""Policies of OpenVLA's kind: a vision-language model answers with tokens, and the last of its vocabulary are actions.

Source: Kim et al., "OpenVLA: An Open-Source Vision-Language-Action Model" (arXiv:2406.09246), section 3.2, and its
released code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmaccel.methods import Unsupported
from robotics.observations import Observation
from robotics.policies import Inputs, Places, Policy, cameras_of, same
from vision_tokens.families import find_host
from vision_tokens.prompts import placeholders_in


@dataclass(frozen=True)
class ActionBins:
    """Actions as tokens: the last tokens of a vocabulary, counted from its end, are bins of [-1, 1].

    vocabulary: size of the tokenizer's vocabulary, without what pads the embedding.
    bins: edges of the bins; there is one bin fewer.  Tokens that are no actions fall into the nearest bin, as in the
    released code.
    """

    vocabulary: int
    bins: int = 256

    def centres(self, tokens: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The middle of each token's bin, in [-1, 1]."""
        edges = torch.linspace(-1, 1, self.bins, dtype=torch.float64, device=tokens.device)
        middle = (edges[1:] + edges[:-1]) / 2
        return middle[(self.vocabulary - tokens - 1).clamp(0, self.bins - 2)]

    def tokens(self, actions: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The token of each action's bin; actions beyond [-1, 1] take the outermost."""
        place = ((actions.double().clamp(-1, 1) + 1) / 2 * (self.bins - 1)).floor().long()
        return self.vocabulary - 1 - place.clamp(max=self.bins - 2)


@dataclass(frozen=True)
class Quantiles:
    """A robot's units: [-1, 1] spans what lies between two quantiles of the training data.

    mask: the numbers of an action that are scaled; others (a gripper's) are as the model says.
    """

    low: Float[Tensor, " dims"]
    high: Float[Tensor, " dims"]
    mask: Bool[Tensor, " dims"] | None = None

    def __call__(self, actions: Float[Tensor, "*rows dims"]) -> Float[Tensor, "*rows dims"]:
        """The actions in the robot's units."""
        low, high = self.low.to(actions), self.high.to(actions)
        scaled = 0.5 * (actions + 1) * (high - low) + low
        return scaled if self.mask is None else torch.where(self.mask.to(actions.device), scaled, actions)


class ActionTokenPolicy(Policy):
    """A transformers vision-language model that decodes action tokens, greedily.

    prepare: makes the arguments of `generate` of an observation, e.g. with the model's processor.
    horizon: actions that are decoded in one answer; 1 for OpenVLA.  units: turns [-1, 1] into the robot's units.
    thoughts: tokens that the model writes before its actions, e.g. where things are (Zawalski et al., "Robotic Control
        via Embodied Chain-of-Thought Reasoning", arXiv:2407.08693); none for OpenVLA.
    Raises `Unsupported` if the model's family is not known to `vision_tokens`.
    """

    def __init__(
        self,
        model: nn.Module,
        prepare: Callable[[Observation], Mapping[str, Any]],
        *,
        cameras: tuple[str, ...],
        dims: int,
        bins: ActionBins,
        horizon: int = 1,
        execute: int | None = None,
        units: Callable[[Tensor], Tensor] = same,
        thoughts: int = 0,
    ) -> None:
        if not hasattr(model, "generate"):
            raise Unsupported(
                f"action tokens are decoded with generate, which {type(model).__name__} has not; give the model with "
                "its language head, e.g. LlavaForConditionalGeneration"
            )
        super().__init__(model, prepare, cameras=cameras, dims=dims, horizon=horizon, execute=execute)
        self.host, self.bins, self.units, self.thoughts = find_host(model), bins, units, thoughts

    @property
    def written(self) -> int:
        """How many tokens an answer has."""
        return self.thoughts + self.horizon * self.dims

    def decide(self, inputs: Inputs, noise: Tensor | None) -> Float[Tensor, "rows horizon dims"]:
        tokens, written = self.horizon * self.dims, self.written
        sequences = self.model.generate(**inputs.model, max_new_tokens=written, min_new_tokens=written, do_sample=False)  # type: ignore[operator]
        actions = self.bins.centres(sequences[:, -tokens:]).float()
        return self.units(rearrange(actions, "rows (horizon dims) -> rows horizon dims", dims=self.dims))

    def places(self, inputs: Inputs) -> Places:
        visual = placeholders_in(self.host, inputs.model)
        return Places(cameras_of(visual, inputs.acting.shown), "decoded", self.written)
