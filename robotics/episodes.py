"""What outlives one observation: it belongs to an episode, is kept apart for every row, and is forgotten at a reset.

A vectorised environment shares one policy; its rows end and begin again one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from jaxtyping import Bool
from torch import Tensor

from mmaccel.attachment import Attachment, attached
from mmaccel.scoped import within

T = TypeVar("T")
Rows = Sequence[int] | None
"""Numbers of an environment's rows; None says all."""


@dataclass(frozen=True)
class Acting:
    """A policy's call: the environment's rows that the model's batch stands for, and what their cameras show.

    shown: which cameras show something.  images: their pictures, [rows, 3, height, width] each, in the same order.
    """

    rows: tuple[int, ...]
    shown: Bool[Tensor, "rows cameras"]
    images: tuple[Tensor, ...]


_acting: ContextVar[Acting | None] = ContextVar("acting", default=None)


class Memory(Protocol):
    """What is forgotten when an episode begins."""

    def reset(self, rows: Rows) -> None:
        """Forgets these rows."""


class RowMemory(Generic[T]):
    """One value for every row that has one."""

    def __init__(self) -> None:
        self._values: dict[int, T] = {}

    def __getitem__(self, row: int) -> T | None:
        return self._values.get(row)

    def __setitem__(self, row: int, value: T) -> None:
        self._values[row] = value

    def reset(self, rows: Rows) -> None:
        """Forgets these rows."""
        for row in list(self._values) if rows is None else rows:
            self._values.pop(row, None)


def forget_at_reset(attachment: Attachment, memory: Memory) -> None:
    """Lets `reset` forget a memory that belongs to an attachment."""
    attachment.shared.setdefault(forget_at_reset, []).append(memory)


def reset(target: Any, rows: Rows = None) -> None:
    """Begins new episodes for a decorated model that is called without a policy around it.

    A `Policy` does so itself in its own `reset`.  Nothing happens if no method on the target remembers anything.
    """
    for owner in (target, getattr(target, "model", None)):
        attachment = attached(owner)
        for memory in attachment.shared.get(forget_at_reset, ()) if attachment else ():
            memory.reset(rows)


def acting_for(call: Acting) -> AbstractContextManager[None]:
    """Within the block, the model's rows are these of the environment."""
    return within(_acting, call)


def acting() -> Acting | None:
    """The policy's call that this thread is in, if any."""
    return _acting.get()
