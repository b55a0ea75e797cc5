"""The one way to change a target: every change registers its undo in the same breath.

Only the instance that was given is touched, in one of four ways: a forward (pre-)hook, an instance attribute, an
instance's `__class__` swapped for a subclass of the same name, and a registered attention name (see
`vision_tokens.attention_rows`).  A failure half-way unwinds itself; `close` unwinds only what is still ours.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from mmaccel.reports import Report

if TYPE_CHECKING:
    from torch import nn

    from mmaccel.methods import Method

_SLOT = "_mmaccel_attachment"
_ABSENT = object()


class Attachment:
    """All that mmaccel changed on one target, the methods it did it for, and the reports of their calls."""

    def __init__(self, target: Any, methods: tuple[Method, ...]) -> None:
        self.target = target
        self.methods = methods
        self.shared: dict[Any, Any] = {}
        """What the methods of one attachment have in common, under a key of their own."""
        self._undo = ExitStack()
        self._foreign: list[Callable[[], str | None]] = []
        self._latest: Report | None = None
        self._mine = threading.local()

    def hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """A forward hook, `hook(module, args, kwargs, output)`; it runs even when the forward raises."""
        handle = module.register_forward_hook(hook, with_kwargs=True, always_call=True)
        self._undo.callback(handle.remove)

    def pre_hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """A forward pre-hook, `hook(module, args, kwargs) -> (args, kwargs) | None`."""
        self._undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute of the instance `owner`; undone by restoring or deleting it."""
        self._undo.callback(_put(owner, name, value))

        def foreign() -> str | None:
            found = vars(owner).get(name, _ABSENT)
            if found is value:
                return None
            now = "deleted it" if found is _ABSENT else f"set it to {_origin(found)}"
            return f"{type(owner).__name__}.{name}: somebody {now}"

        self._foreign.append(foreign)

    def swap_class(self, owner: Any, subclass: type) -> None:
        """Makes the instance `owner` an instance of `subclass`, which carries the same name."""
        before = type(owner)
        owner.__class__ = subclass

        def undo() -> None:
            owner.__class__ = before

        def foreign() -> str | None:
            return None if type(owner) is subclass else f"the class of {before.__name__} is now {type(owner)!r}"

        self._undo.callback(undo)
        self._foreign.append(foreign)

    def start_report(self) -> Report:
        """A fresh report for the call that begins now; `report` returns it from then on."""
        report = Report(methods=tuple(method.described() for method in self.methods))
        self._latest = self._mine.report = report
        return report

    def current_report(self) -> Report | None:
        """The report of the calling thread's last call, or else of the last call of all."""
        return getattr(self._mine, "report", self._latest)

    def close(self) -> None:
        """Undoes every change.  Raises RuntimeError, and undoes nothing, if somebody patched on top of one."""
        if patches := [patch for foreign in self._foreign if (patch := foreign())]:
            raise RuntimeError(
                "cannot take mmaccel off: the target was patched after it. Undo that first, then remove again. "
                + "; ".join(patches)
            )
        self.unwind()

    def unwind(self) -> None:
        """Undoes every change, in reverse order, whoever patched on top."""
        self._foreign.clear()
        self._undo.close()


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of the instance `owner` for the length of the block."""
    undo = _put(owner, name, value)
    try:
        yield
    finally:
        undo()


def _put(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Sets an attribute of the instance `owner`, and returns what restores or deletes it."""
    before = vars(owner).get(name, _ABSENT)
    vars(owner)[name] = value

    def undo() -> None:
        if before is _ABSENT:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before

    return undo


def _origin(value: Any) -> str:
    function = getattr(value, "__wrapped__", value)
    module = getattr(value, "__module__", None) or getattr(function, "__module__", None)
    name = getattr(value, "__qualname__", None)
    return f"{module}.{name}" if module and name else repr(value)


def attached(target: Any) -> Attachment | None:
    """The attachment that `target` carries, if mmaccel decorated it."""
    found = getattr(target, "__dict__", {}).get(_SLOT)
    return found if isinstance(found, Attachment) else None


def attach(target: Any, methods: tuple[Method, ...]) -> Attachment:
    """Attaches the methods in the given order; if one fails, the target is as before and the error goes on."""
    attachment = Attachment(target, methods)
    try:
        for method in methods:
            method.attach(target, attachment)
        attachment.set_attribute(target, _SLOT, attachment)
        attachment.set_attribute(target, "__deepcopy__", lambda memo: _plain(target, copy.deepcopy, memo))
        attachment.set_attribute(target, "__reduce_ex__", lambda protocol: _plain(target, _reduce, protocol))
    except BaseException:
        attachment.unwind()
        raise
    return attachment


def _reduce(target: Any, protocol: int) -> Any:
    """What pickle needs, detached from the living modules (they are decorated again by then); copies no tensor."""
    constructor, arguments, state, *rest = target.__reduce_ex__(protocol)
    tensors = [*target.parameters(), *target.buffers()] if hasattr(target, "parameters") else []
    return (constructor, arguments, copy.deepcopy(state, {id(tensor): tensor for tensor in tensors}), *rest)


def _plain(target: Any, copier: Callable[..., Any], argument: Any) -> Any:
    """Copies or pickles `target` as the plain object that it was before mmaccel."""
    with undecorated(target):
        return copier(target, argument)


@contextmanager
def undecorated(target: Any) -> Iterator[None]:
    """The target without its methods for the length of the block."""
    attachment = attached(target)
    if attachment is None:
        yield
        return
    attachment.close()
    try:
        yield
    finally:
        attach(target, attachment.methods)
