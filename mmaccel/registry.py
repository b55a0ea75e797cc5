"""What is installed under an entry-point group: found by name, imported when asked for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

T = TypeVar("T")


def suggest(given: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name if there is one, and all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(names)}"


@cache
def entries(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name; imports none of them."""
    return {entry.name: entry for entry in entry_points(group=group)}


def find_class(group: str, name: str, base: type[T]) -> type[T]:
    """The class that is installed as `name`, a subclass of `base`.

    Raises ValueError, naming the nearest, if there is none, and TypeError if it is something else.
    """
    known = entries(group)
    if name not in known:
        raise ValueError(f"there is no {base.__name__.lower()} {name!r}; {suggest(name, known)}")
    found = known[name].load()
    if not (isinstance(found, type) and issubclass(found, base)):
        raise TypeError(f"the entry point {name!r} of group {group} is {found!r}, not a subclass of {base.__name__}")
    return found
