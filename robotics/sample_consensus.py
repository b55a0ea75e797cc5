"""Sample consensus, ours: as many actions of a chunk as several draws of it agree on.

The idea of executing what agrees is that of mixture of horizons (arXiv:2511.19433); here nothing is trained: what is
compared are chunks that a stochastic policy drew from different noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmaccel.methods import Unsupported
from robotics.chunk_methods import Call, ChunkMethod
from robotics.horizons import agreed, check_fits, check_least, run_length
from robotics.policies import Chunk, Policy


@dataclass(frozen=True, kw_only=True)
class SampleConsensus(ChunkMethod):
    """Draw several chunks, and execute, of the one nearest to the others, as many actions as they agree on (ours).

    samples: chunks a row, behind one prefix on pi0.
    tolerance: how far the draws may lie from the chosen one, on average, in the robot's units (the L1 norm over an
        action's numbers); without it, `ratio` times what they do over the first `least` actions.
    least, most: bounds of what is executed; at most the chunk by default.
    The chosen chunk is one that was drawn, never a mean: of two ways round a thing, the mean runs into it.
    """

    name: ClassVar[str] = "sample-consensus"

    samples: int = 4
    tolerance: float | None = None
    ratio: float = 2.0
    least: int = 2
    most: int | None = None

    def __post_init__(self) -> None:
        check_least(self.name, self.least, self.most)
        if self.samples < 2:
            raise ValueError(f"{self.name} compares samples, at least 2; got {self.samples!r}")
        for name in ("tolerance", "ratio"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{self.name}'s {name} is above 0; got {value!r}")

    def check(self, policy: Policy) -> None:
        """Raises `Unsupported` for a policy that draws no noise."""
        if not policy.stochastic:
            raise Unsupported(
                f"{self.name} compares draws, and a {type(policy).__name__} draws no noise: all would be the same; "
                "fixed-horizon works on any policy with chunks"
            )
        check_fits(self.name, self.least, policy)

    def act(self, call: Call) -> Chunk:
        drawn = call.policy.sample(call.inputs, self.samples, call.generator, call.noise)
        chosen = most_central(drawn)
        actions = drawn[torch.arange(len(drawn), device=drawn.device), chosen]
        differ = spread(drawn, actions)
        call.said["disagreement"] = differ.tolist()
        if self.tolerance is None:
            execute = agreed(differ, self.least, self.ratio)
        else:
            execute = run_length(differ <= self.tolerance, self.least)
        return Chunk(actions, execute.clamp(max=self.most or call.policy.horizon))


def most_central(drawn: Float[Tensor, "rows samples steps dims"]) -> Int[Tensor, " rows"]:
    """The sample with the smallest sum of L1 distances to the others."""
    flat = drawn.flatten(2)
    return (flat[:, :, None] - flat[:, None]).abs().sum(dim=(-1, -2)).argmin(dim=-1)


def spread(
    drawn: Float[Tensor, "rows samples steps dims"], chosen: Float[Tensor, "rows steps dims"]
) -> Float[Tensor, "rows steps"]:
    """How far the other samples lie from the chosen one at each step: the mean L1 norm over an action's numbers."""
    return (drawn - chosen[:, None]).abs().sum(dim=-1).sum(dim=1) / (drawn.shape[1] - 1)
