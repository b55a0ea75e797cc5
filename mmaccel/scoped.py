"""A context variable's value, for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def within(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Sets the variable for the block, and puts back what it was, also when the block raises."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
