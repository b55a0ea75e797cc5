"""Methods that act on whole chunks of actions: which of them are executed, and how they are made of several."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mmaccel.methods import Method, Unsupported
from robotics.episodes import Memory, forget_at_reset
from robotics.policies import Chunk, Inputs, Policy

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment


@dataclass(frozen=True)
class Call:
    """One call of a policy's `act`: what it was called with, and what the method remembers of its rows.

    said: what the method wants the report to say.
    """

    policy: Policy
    inputs: Inputs
    generator: torch.Generator | None
    noise: Tensor | None
    memory: Any
    said: dict[str, Any]

    def plain(self) -> Chunk:
        """What the policy does without the method."""
        return type(self.policy).act(self.policy, self.inputs, self.generator, self.noise)


@dataclass(frozen=True, kw_only=True)
class ChunkMethod(Method):
    """Base of the methods that decorate a policy's `act`."""

    stages: ClassVar[tuple[str, ...]] = ("execute",)
    knob: ClassVar[str | None] = None
    needs_processor: ClassVar[bool] = False

    @abstractmethod
    def act(self, call: Call) -> Chunk:
        """What the policy is going to do."""

    def check(self, policy: Policy) -> None:
        """Raises `Unsupported` or ValueError for a policy that the method cannot decorate."""

    def memory(self) -> Memory | None:
        """What the method remembers of an episode, made when it is applied."""
        return None

    def attach(self, target: Any, attachment: Attachment) -> None:
        if not isinstance(target, Policy):
            raise Unsupported(
                f"{self.name} decorates a policy; got {type(target).__name__}. Put PI0Policy, ActionTokenPolicy or "
                "LerobotPolicy around it"
            )
        if target.horizon < 2:
            raise Unsupported(
                f"{self.name} works on chunks, and this {type(target).__name__} makes one action a call; there is "
                "nothing to choose"
            )
        self.check(target)
        memory = self.memory()
        if memory is not None:
            forget_at_reset(attachment, memory)

        def act(inputs: Inputs, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Chunk:
            before, said = attachment.current_report(), dict[str, Any]()
            chunk = self.act(Call(target, inputs, generator, noise, memory, said))
            report = attachment.current_report()
            if report is None or report is before:  # no method on the model has begun one
                report = attachment.start_report()
            report.record("executed", float(chunk.execute.float().mean()), target.execute, "actions a chunk")
            report.facts |= {"executed": chunk.execute.tolist(), **said}
            return chunk

        attachment.set_attribute(target, "act", act)
