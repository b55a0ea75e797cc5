"""Detectors and searches as plain data: {"detector": "colour-shape"}, found by name through an entry-point group.

What is built in Python may also be any callable; what is written down has to be found again, as one of ours or as
"package.module:name".
"""

from __future__ import annotations

import functools
from abc import ABC
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Self

from mmaccel.plain_data import adapter, build
from mmaccel.registry import entries, find_class


class Named(ABC):
    """Base class of what has a name and settings.  Subclasses are frozen dataclasses; their fields are the settings."""

    kind: ClassVar[str]
    """What it is in one word, which is also the key of its name in plain data."""
    name: ClassVar[str]
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    @classmethod
    def group(cls) -> str:
        """The entry-point group under which such things are found."""
        return f"mmaccel.{cls.kind}s"

    def to_dict(self) -> dict[str, Any]:
        """It as plain data; `from_dict` gives back an equal one."""
        cls = type(self)
        reference = f"{cls.__module__}:{cls.__qualname__}"
        entry = entries(self.group()).get(cls.name)
        known_as = cls.name if entry is not None and entry.value == reference else reference
        return {self.kind: known_as, **adapter(cls).dump_python(self, mode="json")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Builds it from its plain data.  Raises ValueError for unknown, missing and wrong settings."""
        settings = {key: value for key, value in data.items() if key != cls.kind}
        return build(cls, cls.kind, cls.name, settings)

    @classmethod
    def summary(cls) -> str:
        """The first line of its docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]


def resolve(value: Any, base: type[Named]) -> Any:
    """The object that `value` stands for: one of ours, a callable, a name, a dictionary, or a reference.

    Raises ValueError that says what was given and what works.
    """
    kind = base.kind
    if isinstance(value, str):
        found = _imported(value, kind) if ":" in value else find_class(base.group(), value, base)
        return found() if isinstance(found, type) and issubclass(found, base) else resolve(found, base)
    if isinstance(value, Mapping):
        if not isinstance(value.get(kind), str):
            raise ValueError(f'a {kind} is a mapping with a key "{kind}"; got {dict(value)!r}')
        name = value[kind]
        found = _imported(name, kind) if ":" in name else find_class(base.group(), name, base)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise ValueError(f'the key "{kind}" names a class of {kind}s; {name} is {found!r}')
        return found.from_dict(value)
    if isinstance(value, base) or (callable(value) and not isinstance(value, type)):
        return value
    example = f"{value.__name__}()" if isinstance(value, type) else f'"{min(entries(base.group()), default="...")}"'
    raise ValueError(f"a {kind} is one of ours, a callable, a name or a dictionary, e.g. {example}; got {value!r}")


def plain(value: Any) -> dict[str, Any] | str:
    """It as plain data, which `resolve` reads.  Raises ValueError for what no name leads to, such as a lambda."""
    if isinstance(value, Named):
        return value.to_dict()
    module, path = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if isinstance(module, str) and isinstance(path, str) and "<" not in path and module != "__main__":
        return f"{module}:{path}"
    raise ValueError(f"{value!r} can be used, but not written down: define it as a function at the top of a module")


def name_of(value: Any) -> str:
    """What messages and reports call it."""
    return value.name if isinstance(value, Named) else getattr(value, "__qualname__", type(value).__qualname__)


def _imported(reference: str, kind: str) -> Any:
    module, _, path = reference.partition(":")
    try:
        return functools.reduce(getattr, path.split("."), import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the {kind} {reference!r} cannot be imported ({error}); a reference is package.module:name"
        ) from error
