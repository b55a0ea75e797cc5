"""Dataclasses from plain data and back: what methods, rewards and searches share.  pydantic is imported when used."""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, TypeVar

from mmaccel.registry import suggest

T = TypeVar("T")


class Described(ABC):
    """Base of dataclasses that have a name, a docstring that tells users what they are, and settings as plain data."""

    name: ClassVar[str]
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema of the settings, for forms and job files."""
        schema: dict[str, Any] = adapter(cls).json_schema()
        return schema

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]


@cache
def adapter(cls: Any) -> Any:
    """pydantic's adapter of a dataclass: coercion, checks, JSON schema."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def build(cls: type[T], kind: str, name: str, settings: Mapping[str, Any]) -> T:
    """An instance of the dataclass `cls`, a `kind` ("method") called `name`, from its settings.

    Raises ValueError for unknown settings (naming the nearest), missing ones and values of the wrong type.
    """
    from pydantic import ValidationError

    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]  # a dataclass, as said
    for key in settings:
        if key not in known:
            raise ValueError(f"{name} has no setting {key!r}; {suggest(str(key), known)}")
    try:
        built: T = adapter(cls).validate_python(dict(settings))  # type: ignore[arg-type]  # classes are hashable
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] in ("missing", "missing_argument"):
            example = {kind: name, str(problem["loc"][0]): "..."}
            raise ValueError(f"{name} needs its setting {problem['loc'][0]!r}, e.g. {example}") from None
        message = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:  # the dataclass's own check of its settings, which says what was given
            raise ValueError(f"{name}: {message}") from None
        raise ValueError(f"{name}: {problem['loc'][0]}: {message}; got {problem['input']!r}") from None
    return built
