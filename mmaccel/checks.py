"""`check`: does a method keep its laws on *this* model, the user's own checkpoint?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmaccel.attachment import undecorated
from mmaccel.methods import Method


@dataclass(frozen=True)
class LawResult:
    """One law, held against one target: it passes if what was measured is at most the bar."""

    law: str
    measured: float
    bar: float

    @property
    def passed(self) -> bool:
        """Whether the law holds."""
        return self.measured <= self.bar

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.law}: {self.measured:.3g} (at most {self.bar:.3g})"


@dataclass(frozen=True)
class CheckReport:
    """The laws of one method on one target."""

    method: Method
    laws: list[LawResult]

    @property
    def passed(self) -> bool:
        """Whether every law holds."""
        return all(law.passed for law in self.laws)

    def __str__(self) -> str:
        return "\n".join([f"mmaccel check: {self.method.to_dict()}", *(f"  {law}" for law in self.laws)])


def check(target: Any, method: Method, processor: Any = None, inputs: Mapping[str, Any] | None = None) -> CheckReport:
    """Runs the method's laws on the target and leaves the target as it was.

    inputs: the arguments of one call of the target; without them the method makes an example with the processor.
    Raises `Unsupported` if the method cannot be applied at all, ValueError if neither inputs nor processor are given.
    """
    if inputs is None and processor is None and method.needs_processor:
        raise ValueError("check needs inputs, or a processor to make an example with")
    with undecorated(target):
        example = method.example(target, processor) if inputs is None else dict(inputs)
        return CheckReport(method, list(method.laws(target, example)))
