"""Rewards, detectors, searches: what has a name and settings, as plain data.

`{"detector": "colour-shape", "smallest": 5}` is found by its name through an entry-point group.  What is built in
Python may also be any callable; what is written down has to be found again: one of the installed ones, a dataclass of
the same base class, or a function at the top of a module, as "package.module:function".
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Self

from mmaccel.plain_data import Described, adapter, build
from mmaccel.registry import entries, find_class


class Named(Described):
    """Base class of what has a name and settings.  Subclasses are frozen dataclasses; their fields are the settings."""

    kind: ClassVar[str]
    """What it is in one word, which is also the key of its name in plain data."""
    called: ClassVar[str | None] = None
    """How a callable that stands for one is called, e.g. "reward(images, prompts)"; None if none can."""

    @classmethod
    def group(cls) -> str:
        """The entry-point group under which such things are found."""
        return f"mmaccel.{cls.kind}s"

    def to_dict(self) -> dict[str, Any]:
        """It as plain data, e.g. {"reward": "clip-score", "model": "x"}; `from_dict` gives back an equal one."""
        cls = type(self)
        reference = f"{cls.__module__}:{cls.__qualname__}"
        entry = entries(self.group()).get(cls.name)
        known_as = cls.name if entry is not None and entry.value == reference else reference
        return {self.kind: known_as, **adapter(cls).dump_python(self, mode="json")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Builds it from its plain data.

        Raises ValueError for unknown keys (naming the nearest), missing ones and values of the wrong type.
        """
        settings = {key: value for key, value in data.items() if key != cls.kind}
        return build(cls, cls.kind, cls.name, settings)


def named_class(name: str, base: type[Named]) -> type[Any]:
    """The class of this name or reference.  Raises ValueError, naming the nearest, if there is none."""
    if ":" not in name:
        return find_class(base.group(), name, base)
    found = imported(name, base.kind)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f'the key "{base.kind}" names a class of {base.kind}s; {name} is {found!r}. Pass the reference itself'
        )
    return found


def named_from_dict(data: Mapping[str, Any], base: type[Named]) -> Any:
    """The object that `data` describes, found by its name under the key of its kind."""
    kind = base.kind
    if not isinstance(data, Mapping) or not isinstance(data.get(kind), str):
        raise ValueError(f'a {kind} is a mapping with a key "{kind}", e.g. {_example(base)}; got {data!r}')
    return named_class(data[kind], base).from_dict(data)


def resolve(value: Any, base: type[Named]) -> Any:
    """The object that `value` stands for.

    value: one of this base class, a callable if such may stand for one, a name, a dictionary, or a reference
    "package.module:name", which is imported.  Raises ValueError that says what was given and the mend.
    """
    kind = base.kind
    if isinstance(value, str):
        found = imported(value, kind) if ":" in value else named_class(value, base)
        return found.from_dict({}) if isinstance(found, type) and issubclass(found, base) else resolve(found, base)
    if isinstance(value, Mapping):
        return named_from_dict(value, base)
    if isinstance(value, type):
        raise ValueError(
            f"a {kind} is an object, and {value.__name__} is a class; build one, with its settings: {value.__name__}()"
        )
    if isinstance(value, base) or (base.called is not None and callable(value)):
        return value
    also = f"a callable {base.called}, " if base.called is not None else ""
    raise ValueError(
        f"a {kind} is a {base.__name__}, {also}a name, a dictionary ({_example(base)}) or a reference "
        f'("package.module:name"); got {value!r}'
    )


def _example(base: type[Named]) -> str:
    return f'{{"{base.kind}": "{min(entries(base.group()), default="...")}"}}'


def plain(value: Any, base: type[Named]) -> dict[str, Any] | str:
    """It as plain data, which `resolve` reads: a dictionary, or a function's "package.module:function".

    Raises ValueError for what cannot be found again by a name: lambdas, closures, partials, bound methods, objects.
    """
    found = resolve(value, base)
    if isinstance(found, Named):
        if "<locals>" in type(found).__qualname__:
            raise ValueError(f"{_unwritable(found, base)} its class is defined inside a function")
        return found.to_dict()
    reference = _reference(found)
    try:
        same = reference is not None and imported(reference, base.kind) is found
    except ValueError:
        same = False
    if reference is None or not same:
        raise ValueError(f"{_unwritable(found, base)} nothing imports it by a name")
    if reference.startswith("__main__:"):
        raise ValueError(f"{_unwritable(found, base)} it belongs to the script that runs now")
    return reference


def imported(reference: str, kind: str) -> Any:
    """What "package.module:name" refers to.  Raises ValueError that says which part is missing."""
    module_name, _, path = reference.partition(":")
    try:
        module = import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise ValueError(
            f"the {kind} {reference!r} cannot be imported ({error}); a reference is package.module:name, of an "
            "installed package or a module in the working folder"
        ) from error
    try:
        return functools.reduce(getattr, path.split("."), module)
    except AttributeError:
        raise ValueError(f"the {kind} {reference!r} does not exist: {module_name} has no {path!r}") from None


def name_of(value: Any) -> str:
    """What messages and reports call it: our name, or the function's."""
    if isinstance(value, Named):
        return value.name
    if isinstance(value, functools.partial):
        return f"partial of {name_of(value.func)}"
    reference = _reference(value)
    return reference.removeprefix("__main__:") if reference else type(value).__qualname__


def _reference(function: Any) -> str | None:
    module, path = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return f"{module}:{path}" if isinstance(module, str) and isinstance(path, str) else None


def _unwritable(value: Any, base: type[Named]) -> str:
    return (
        f"the {base.kind} {name_of(value)} can be used, but not written down. Define it as a function at the top of a "
        f"module, or as a frozen dataclass that subclasses {base.__name__} there:"
    )


@dataclass(frozen=True)
class NamedField:
    """Marks the type of a dataclass field that holds one: `Annotated[Any, NamedField(Reward)]`."""

    base: type[Named]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            functools.partial(resolve, base=self.base),
            serialization=core_schema.plain_serializer_function_ser_schema(functools.partial(plain, base=self.base)),
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        kind = self.base.kind
        return {
            "description": f"a {kind}'s name, its dictionary, or a reference package.module:name",
            "anyOf": [
                {"type": "string"},
                {"type": "object", "properties": {kind: {"type": "string"}}, "required": [kind]},
            ],
        }
