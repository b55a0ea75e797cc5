"""The plain ways to execute chunks: a fixed part of each, or a mean of those that overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from robotics.chunk_methods import Call, ChunkMethod
from robotics.episodes import RowMemory
from robotics.horizons import check_fits, check_least
from robotics.policies import Chunk, Policy

Overlapping = list[Float[Tensor, "_ dims"]]
"""What chunks that were made earlier say of the steps that are still to come, the oldest first."""


@dataclass(frozen=True, kw_only=True)
class FixedHorizon(ChunkMethod):
    """Execute the same number of actions of every chunk.

    least: that number, of actions.
    """

    name: ClassVar[str] = "fixed-horizon"
    least: int = 5

    def __post_init__(self) -> None:
        check_least(self.name, self.least, None)

    def check(self, policy: Policy) -> None:
        """Raises ValueError if a chunk is shorter."""
        check_fits(self.name, self.least, policy)

    def act(self, call: Call) -> Chunk:
        chunk = call.plain()
        return Chunk(chunk.actions, torch.full_like(chunk.execute, self.least))


@dataclass(frozen=True, kw_only=True)
class TemporalEnsembling(ChunkMethod):
    """Execute the mean of what the overlapping chunks say of a step, older ones weighing more.

    decay: a chunk weighs exp(-decay * n), n counting from the oldest that still reaches the step: 0.01 in ACT.
    least: actions executed before the policy is asked again; 1 in ACT.
    Source: Zhao et al., "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware" (arXiv:2304.13705),
    section 4.2.
    """

    name: ClassVar[str] = "temporal-ensembling"
    decay: float = 0.01
    least: int = 1

    def __post_init__(self) -> None:
        check_least(self.name, self.least, None)

    def check(self, policy: Policy) -> None:
        """Raises ValueError if a chunk is shorter."""
        check_fits(self.name, self.least, policy)

    def memory(self) -> RowMemory[Overlapping]:
        return RowMemory()

    def act(self, call: Call) -> Chunk:
        chunk, actions = call.plain(), []
        for row, own in zip(call.inputs.rows, chunk.actions, strict=True):
            overlapping = [*(call.memory[row] or []), own]
            actions.append(ensembled(overlapping, self.decay))
            call.memory[row] = [later for one in overlapping if len(later := one[self.least :])]
        return Chunk(torch.stack(actions), torch.full_like(chunk.execute, self.least))


def ensembled(overlapping: Overlapping, decay: float) -> Float[Tensor, "steps dims"]:
    """The weighted mean, at each step of the newest chunk, of all that reach it."""
    newest, steps = overlapping[-1], len(overlapping[-1])
    total, weight = torch.zeros_like(newest), newest.new_zeros(steps, 1)
    reach = torch.stack([torch.arange(steps, device=newest.device) < len(one) for one in overlapping])
    ages = reach.long().cumsum(dim=0) - 1  # from the oldest that reaches the step
    for number, one in enumerate(overlapping):
        own = torch.exp(-decay * ages[number, : len(one), None].to(newest.dtype))
        total[: len(one)] += own * one
        weight[: len(one)] += own
    return total / weight
