"""The type checker behind `--jaxtyping-packages`: it checks the shapes and dtypes of tensors, and nothing else.

Everything else is left to mypy.  Checked here, too, a wrong input would meet the checker's message before ours, which
tests read; and beartype refuses `typing.Self` on a method whose class it does not decorate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`beartype(function)`, for the annotations that say a shape; `function` is a copy that jaxtyping made for us."""
    function.__annotations__ = {
        name: hint if says_a_shape(hint) else Any for name, hint in function.__annotations__.items()
    }
    return beartype(function)


def says_a_shape(hint: Any) -> bool:
    """Whether a jaxtyping array stands anywhere in a type hint."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(says_a_shape(part) for part in get_args(hint))
