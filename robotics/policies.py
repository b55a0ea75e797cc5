"""One protocol for robot policies: begin an episode, observe, act a chunk; and where visual and action tokens sit.

>>> policy.reset()
>>> inputs = policy.observe(Observation({"top": pictures}, state, ["push the red disc"]))
>>> chunk = policy.act(inputs)  # chunk.actions: [rows, horizon, dims]; chunk.execute of them, then observe again

`robotics.control.Controller` does the last step, action by action.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmaccel.methods import Unsupported
from robotics.episodes import Acting, Rows, acting_for, reset
from robotics.observations import Observation

if TYPE_CHECKING:
    from robotics.horizons import ByHorizon


@dataclass(frozen=True)
class Inputs:
    """What a policy's model reads of one observation.

    model: its arguments.  acting: the environment's rows, and what their cameras show.
    """

    model: Mapping[str, Any]
    acting: Acting

    @property
    def rows(self) -> tuple[int, ...]:
        """The environment's rows."""
        return self.acting.rows


@dataclass(frozen=True)
class Chunk:
    """What a policy is going to do.

    actions: in the robot's units.  execute: how many of them are to be executed before the next observation.
    """

    actions: Float[Tensor, "rows horizon dims"]
    execute: Int[Tensor, " rows"]


@dataclass(frozen=True)
class Places:
    """Where tokens sit.

    camera: for each token of the prompt the camera that it shows, -1 for those that are not visual.
    actions: whether action tokens are decoded one by one behind the prompt, or are a suffix that is denoised at once.
    action_tokens: how many there are.  between: other tokens between the prompt and them (pi0's state).
    """

    camera: Int[Tensor, "rows tokens"]
    actions: Literal["decoded", "suffix"]
    action_tokens: int
    between: int = 0


class Policy(ABC):
    """Base of the policies.

    model: what is decorated.  prepare: makes its arguments of an observation that was checked; changes no state.
    cameras: those that it reads, in its order.  dims: numbers in an action.  horizon: actions in a chunk.
    execute: how many of them are executed, if no method says otherwise; by default all.
    stochastic: whether `act` draws noise.  pads: whether rows may lack cameras.
    horizons: the lengths that it was trained to make chunks of together, if it was.
    """

    stochastic: bool = False
    pads: bool = False
    horizons: tuple[int, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        prepare: Callable[[Observation], Mapping[str, Any]],
        *,
        cameras: tuple[str, ...],
        dims: int,
        horizon: int,
        execute: int | None = None,
    ) -> None:
        self.model, self.prepare, self.cameras = model, prepare, cameras
        self.dims, self.horizon = dims, horizon
        self.execute = horizon if execute is None else execute
        self._begun = False
        self._rows: int | None = None

    @abstractmethod
    def decide(self, inputs: Inputs, noise: Tensor | None) -> Float[Tensor, "rows horizon dims"]:
        """A chunk of actions, in the robot's units; noise as `draw` gives it."""

    @abstractmethod
    def places(self, inputs: Inputs) -> Places:
        """Where visual and action tokens sit."""

    def draw(self, inputs: Inputs, samples: int, generator: torch.Generator | None) -> Tensor | None:
        """Noise for so many chunks a row, [rows, samples, ...]; None if the policy draws none."""
        return None

    def reset(self, rows: Rows = None) -> None:
        """Begins new episodes, of some rows or (before the number of rows may change) of all."""
        if rows is not None and self._rows is not None and (wrong := [row for row in rows if row >= self._rows]):
            raise ValueError(f"there are rows 0..{self._rows - 1}; got row {wrong[0]} to reset")
        if rows is None:
            self._begun, self._rows = True, None
        reset(self, rows)

    def observe(self, observation: Observation) -> Inputs:
        """What the model reads of an observation.

        Raises RuntimeError if no episode was begun, ValueError for cameras that are missing or padded, numbers that
        are none, and another number of rows than the episodes began with.
        """
        if not self._begun:
            raise RuntimeError("no episode was begun: call policy.reset() before the first observation")
        observation.check(self.cameras, self.pads)
        if self._rows is None:
            self._rows = observation.count if observation.rows is None else max(observation.rows) + 1
        if observation.rows is None and observation.count != self._rows:
            raise ValueError(
                f"the episodes began with {self._rows} rows, and this observation has {observation.count}; name them "
                "(Observation(rows=...)), or call policy.reset() before the number of environments changes"
            )
        rows = tuple(range(observation.count) if observation.rows is None else observation.rows)
        if max(rows) >= self._rows:
            raise ValueError(f"the episodes began with {self._rows} rows; got an observation of row {max(rows)}")
        images = tuple(observation.images[name] for name in self.cameras)
        return Inputs(self.prepare(observation), Acting(rows, observation.shown(self.cameras), images))

    def act(self, inputs: Inputs, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Chunk:
        """A chunk of actions.

        noise: in place of what the generator would draw, [rows, ...].
        """
        if noise is None and (drawn := self.draw(inputs, 1, generator)) is not None:
            noise = drawn[:, 0]
        with acting_for(inputs.acting), torch.no_grad():
            actions = self.decide(inputs, noise)
        return Chunk(actions, torch.full((len(actions),), self.execute))

    def sample(
        self, inputs: Inputs, samples: int, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Float[Tensor, "rows samples horizon dims"]:
        """Several chunks a row, each from its own noise; noise: [rows, samples, ...]."""
        drawn = self.draw(inputs, samples, generator) if noise is None else noise
        if drawn is None:
            raise ValueError(f"{type(self).__name__} draws no noise, so all its samples would be the same")
        with acting_for(inputs.acting), torch.no_grad():
            return self.decide_all(inputs, drawn)

    def decide_all(self, inputs: Inputs, noise: Tensor) -> Float[Tensor, "rows samples horizon dims"]:
        """A chunk for each sample of noise, [rows, samples, ...]; here one after the other."""
        return torch.stack([self.decide(inputs, own) for own in noise.unbind(dim=1)], dim=1)

    def by_horizon(
        self, inputs: Inputs, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> ByHorizon:
        """A chunk as all its horizons make it together.  Raises `Unsupported` for policies that have none."""
        raise Unsupported(f"a {type(self).__name__} was not trained with several horizons")


def same(actions: Tensor) -> Tensor:
    """Leaves actions in the model's units."""
    return actions


def cameras_of(
    visual: Bool[Tensor, "rows tokens"], shown: Bool[Tensor, "rows cameras"] | None = None
) -> Int[Tensor, "rows tokens"]:
    """The camera that each token shows, -1 for those that are not visual.

    shown: which cameras show something; a row's visual tokens are divided among them, in order.  Without it, visual
    tokens that stand together are a camera.  Raises ValueError if a row's tokens cannot be divided equally.
    """
    if shown is None:
        begins = visual & ~torch.cat([torch.zeros_like(visual[:, :1]), visual[:, :-1]], dim=-1)
        return torch.where(visual, begins.cumsum(dim=-1) - 1, -1)
    shown = shown.to(visual.device)
    counts, cameras = visual.sum(dim=-1), shown.sum(dim=-1)
    if bool((counts % cameras.clamp(min=1)).any()):
        raise ValueError(
            f"rows show {cameras.tolist()} cameras with {counts.tolist()} visual tokens in all, which are no equal "
            "parts; the policy's prompt must have as many places for every camera"
        )
    slot = (visual.cumsum(dim=-1) - 1) // (counts // cameras.clamp(min=1)).clamp(min=1)[:, None]
    number = shown.int().argsort(dim=-1, descending=True, stable=True)  # of the cameras that show something, in order
    return torch.where(visual, number.gather(-1, slot.clamp(0, shown.shape[-1] - 1)), -1)
