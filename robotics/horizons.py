"""Mixture of horizons: chunks of several lengths in one pass, and as many actions as they agree on.

Source: "Mixture of Horizons in Action Chunking" (arXiv:2511.19433v2), sections 3.2 to 3.4, and its released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmaccel.methods import Unsupported
from robotics.chunk_methods import Call, ChunkMethod
from robotics.policies import Chunk, Policy


@dataclass(frozen=True, kw_only=True)
class HorizonConsensus(ChunkMethod):
    """Execute as many actions of a chunk as the horizons, trained together, agree on.

    For policies with trained horizons and a gate (`PI0Policy(gate=...)`); `SampleConsensus` needs neither.
    rule: "disagreement" stops where the horizons differ, in velocity over all denoising steps, as much as `ratio` times
        what they do over the first `least` actions; "vote", for policies that regress a chunk in one pass, where fewer
        than two thirds of the horizons lie as near as 95 % of them do over the first.
    least: actions that are executed at any rate.  most: at most so many; 20 in the released vote.
    active: where so many horizons or fewer reach, the disagreement is not trusted, and execution stops.
    At equality execution stops, as in the released code (in the paper it goes on).  Disagreement is of the robot's own
    numbers of an action; the release counts the model's padding, too, and is right for one row only.
    """

    name: ClassVar[str] = "horizon-consensus"

    ratio: float = 1.0
    least: int = 5
    most: int | None = None
    active: int = 5
    rule: Literal["disagreement", "vote"] = "disagreement"

    def __post_init__(self) -> None:
        check_least(self.name, self.least, self.most)
        if self.ratio <= 0:
            raise ValueError(f"{self.name}'s ratio is above 0; got {self.ratio!r}")

    def check(self, policy: Policy) -> None:
        """Raises `Unsupported` for a policy that was not trained with horizons."""
        if len(policy.horizons) < 2:
            raise Unsupported(
                f"{self.name} needs a policy that was trained with several horizons, and its gate (PI0Policy(gate="
                "HorizonGate(...))); for any policy that draws noise there is SampleConsensus"
            )
        check_fits(self.name, self.least, policy)

    def act(self, call: Call) -> Chunk:
        found = call.policy.by_horizon(call.inputs, call.generator, call.noise)
        if self.rule == "vote":
            if found.actions is None:
                raise Unsupported(
                    f"a vote is of horizons that say an action in one pass; this {type(call.policy).__name__} denoises "
                    "one: use rule='disagreement'"
                )
            execute = voted(found.actions, found.fused, call.policy.horizons, self.least)
        else:
            assert found.disagreement is not None
            call.said["disagreement"] = found.disagreement.tolist()
            execute = agreed(found.disagreement, self.least, self.ratio, call.policy.horizons, self.active)
        return Chunk(found.fused, execute.clamp(max=self.most or call.policy.horizon))


@dataclass(frozen=True)
class ByHorizon:
    """What a policy with several horizons says.

    fused: the actions.  disagreement: of each step, for policies that denoise.  actions: every horizon's, for those
    that regress.  weights: the gate's, by denoising step.
    """

    fused: Float[Tensor, "rows steps dims"]
    disagreement: Float[Tensor, "rows steps"] | None = None
    actions: Float[Tensor, "rows horizons steps dims"] | None = None
    weights: list[Float[Tensor, "rows steps horizons"]] | None = None


def reaches(horizons: Sequence[int], steps: int, device: torch.device | None = None) -> Bool[Tensor, "steps horizons"]:
    """Which horizons reach each step of a chunk."""
    return torch.arange(steps, device=device)[:, None] < torch.tensor(list(horizons), device=device)


def gate_weights(
    logits: Float[Tensor, "rows steps horizons"], horizons: Sequence[int]
) -> Float[Tensor, "rows steps horizons"]:
    """What each horizon counts at each step: a softmax over those that reach it.  Source: equation 4."""
    valid = reaches(horizons, logits.shape[1], logits.device)
    return logits.masked_fill(~valid, torch.finfo(logits.dtype).min).softmax(dim=-1)


def fused(
    outputs: Float[Tensor, "rows horizons steps dims"], weights: Float[Tensor, "rows steps horizons"]
) -> Float[Tensor, "rows steps dims"]:
    """The weighted mean over horizons.  Source: equation 5."""
    return torch.einsum("rhsd,rsh->rsd", outputs, weights)


def distances(
    outputs: Float[Tensor, "rows horizons steps dims"], mean: Float[Tensor, "rows steps dims"]
) -> Float[Tensor, "rows steps horizons"]:
    """How far every horizon lies from the mean: the L1 norm over an action's numbers."""
    return (outputs - mean[:, None]).abs().sum(dim=-1).transpose(1, 2)


def disagreement(
    outputs: Float[Tensor, "rows horizons steps dims"],
    mean: Float[Tensor, "rows steps dims"],
    weights: Float[Tensor, "rows steps horizons"],
) -> Float[Tensor, "rows steps"]:
    """How far the horizons lie from their mean, as the gate weighs them.  Source: equation 8."""
    return (distances(outputs, mean) * weights).sum(dim=-1)


def agreed(
    differ: Float[Tensor, "rows steps"],
    least: int,
    ratio: float,
    horizons: Sequence[int] | None = None,
    active: int = 0,
) -> Int[Tensor, " rows"]:
    """How many actions are executed: until they differ as much as `ratio` times the first `least` do on average.

    With horizons it also ends where `active` of them or fewer reach.  Source: algorithm 1.
    """
    goes_on = differ < ratio * differ[:, :least].mean(dim=-1, keepdim=True)
    if horizons is not None:
        goes_on &= reaches(horizons, differ.shape[1], differ.device).sum(dim=-1) > active
    return run_length(goes_on, least)


def voted(
    outputs: Float[Tensor, "rows horizons steps dims"],
    mean: Float[Tensor, "rows steps dims"],
    horizons: Sequence[int],
    least: int,
    quantile: float = 0.95,
) -> Int[Tensor, " rows"]:
    """How many actions are executed: while more than two thirds of several horizons lie near their mean.

    Near is what that quantile of the distances over the first `least` actions is.  Source: the released code for
    policies that regress.
    """
    valid = reaches(horizons, mean.shape[1], mean.device)
    far = distances(outputs, mean)
    near = torch.stack([own[:least][valid[:least]].quantile(quantile) for own in far])
    votes = ((far < near[:, None, None]) & valid).sum(dim=-1)
    reach = valid.sum(dim=-1)
    return run_length((reach > 1) & (votes > 2 * reach // 3), least)


def run_length(goes_on: Bool[Tensor, "rows steps"], least: int) -> Int[Tensor, " rows"]:
    """`least`, and one for each step behind them until the first that does not go on."""
    return least + goes_on[:, least:].long().cumprod(dim=-1).sum(dim=-1)


def check_least(name: str, least: int, most: int | None) -> None:
    """Raises ValueError for numbers of actions that no chunk can be executed by."""
    if least < 1 or (most is not None and most < least):
        raise ValueError(
            f"{name} executes at least one action and at most no fewer than that; got least={least!r}, most={most!r}"
        )


def check_fits(name: str, least: int, policy: Policy) -> None:
    """Raises ValueError if a chunk holds fewer actions than are to be executed."""
    if least > policy.horizon:
        raise ValueError(
            f"{name} is to execute at least {least} actions, and a chunk of this {type(policy).__name__} has "
            f"{policy.horizon}; pass least={policy.horizon} or less"
        )
