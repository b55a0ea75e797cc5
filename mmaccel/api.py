"""`apply`, `remove`, `applied`, `decorate` and `report`: what a user does with a method."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from mmaccel.attachment import Attachment, attach, attached
from mmaccel.methods import Method, in_order
from mmaccel.reports import Report

T = TypeVar("T")
P = ParamSpec("P")


def apply(target: T, *methods: Method) -> T:
    """Decorates `target` in place and returns the same object.

    On a target that is decorated already the methods are added; one of the same kind replaces the earlier one.
    Raises `Unsupported` if a method cannot handle the target, ValueError if two methods act on one stage, TypeError
    if something is not a method; the target is then as it was before the call.
    """
    if not methods:
        raise ValueError("apply needs at least one method, e.g. mmaccel.apply(model, HiRED(budget=0.2))")
    for method in methods:
        if not isinstance(method, Method):
            raise TypeError(
                f"apply takes methods, e.g. HiRED(budget=0.2); got {method!r}. A recipe's dictionaries become methods "
                "with mmaccel.recipe_from_data"
            )
    current = attached(target)
    names = {method.name for method in methods}
    earlier = current.methods if current else ()
    plan = in_order([*(method for method in earlier if method.name not in names), *methods])
    if current:
        current.close()
    try:
        attach(target, plan)
    except BaseException:
        if earlier:
            attach(target, earlier)
        raise
    return target


def remove(target: T) -> T:
    """Takes everything off again: the target is bit for bit what it was.  Returns the same object.

    Raises ValueError if nothing is applied, RuntimeError if somebody patched the target after mmaccel.
    """
    _require(target).close()
    return target


def report(target: Any) -> Report:
    """What the last call of the decorated target did (the calling thread's last call, if it made one).

    Raises ValueError if the target is not decorated or was not called since.
    """
    return _report(_require(target))


def _report(attachment: Attachment) -> Report:
    found = attachment.current_report()
    if found is None:
        raise ValueError("nothing to report yet: the target was not called since the methods were applied")
    return found


def _require(target: Any) -> Attachment:
    attachment = attached(target)
    if attachment is None:
        raise ValueError(
            f"no method is applied to this {type(target).__name__}; decorate it with mmaccel.apply(target, method)"
        )
    return attachment


@dataclass(frozen=True)
class Applied:
    """What `applied` hands to its block, and what remains of it."""

    target: Any
    attachment: Attachment

    @property
    def report(self) -> Report:
        """What the last call of the decorated target did; after the block, too.  ValueError if there was none."""
        now = attached(self.target)
        return _report(now if now and now.current_report() else self.attachment)


@contextmanager
def applied(target: Any, *methods: Method) -> Iterator[Applied]:
    """Decorates `target` for the length of a with-block; methods applied before stand again afterwards."""
    current = attached(target)
    earlier = current.methods if current else ()
    apply(target, *methods)
    try:
        yield Applied(target, _require(target))
    finally:
        if attached(target):
            remove(target)
        if earlier:
            apply(target, *earlier)


def decorate(*methods: Method) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """For a function that loads or builds a target: what it returns comes back decorated."""

    def decorator(load: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(load)
        def loaded(*args: P.args, **kwargs: P.kwargs) -> T:
            return apply(load(*args, **kwargs), *methods)

        return loaded

    return decorator
