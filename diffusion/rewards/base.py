"""What a reward is, and how it is written down.

A reward is any callable `reward(images, prompts, **context) -> [rows]`, the higher the better.
images: floats in 0..1, [rows, 3, height, width], or for video [rows, frames, 3, height, width].
prompts: one a row, None where the pipeline has none.
context: whatever else the search can tell; rewards ignore what they do not know.

A search built in Python takes any callable.  One that is written down needs a reward that can be found again: one of
ours, a dataclass as plain as a method, or a function at the top of a module.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any, ClassVar, Self, TypeAlias, cast

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema
from torch import Tensor

from mmaccel.plain_data import adapter, build
from mmaccel.registry import entries, find_class

GROUP = "mmaccel.rewards"
"""The entry-point group under which rewards are found by name."""

Prompts: TypeAlias = Sequence[str | None]


class Reward(ABC):
    """Base class of our rewards.  Subclasses are frozen, keyword-only dataclasses; their fields are the settings.

    Models that a reward needs are loaded at its first call and shared by equal settings (`diffusion.rewards.models`);
    the object itself stays as small as its settings.
    """

    name: ClassVar[str]
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            value = getattr(self, field.name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, field.name, os.fspath(value))  # plain data, before anyone has seen the object

    @abstractmethod
    def __call__(self, images: Tensor, prompts: Prompts | None, **context: Any) -> Tensor:
        """The reward of every row, [rows], float32 on the device of the images."""

    def to_dict(self) -> dict[str, Any]:
        """The reward as plain data, e.g. {"reward": "clip-score", "model": "pocket-clip"}."""
        cls = type(self)
        reference = f"{cls.__module__}:{cls.__qualname__}"
        entry = entries(GROUP).get(cls.name)
        known_as = cls.name if entry is not None and entry.value == reference else reference
        return {"reward": known_as, **adapter(cls).dump_python(self, mode="json")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Builds the reward from its plain data.

        Raises ValueError for unknown keys (naming the nearest), missing ones and values of the wrong type.
        """
        settings = {key: value for key, value in data.items() if key != "reward"}
        return build(cls, "reward", cls.name, settings)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema of the settings, for forms and job files."""
        schema: dict[str, Any] = adapter(cls).json_schema()
        return schema

    @classmethod
    def summary(cls) -> str:
        """The first line of the reward's docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]


_KINDS = (
    'a Reward, a callable reward(images, prompts, **context), a name ("clip-score"), a dictionary '
    '({"reward": "clip-score"}) or a reference ("package.module:function")'
)


def list_rewards() -> list[str]:
    """The names of all installed rewards, ours and third parties', sorted.  Imports none of them."""
    return sorted(entries(GROUP))


def get_reward(name: str) -> type[Reward]:
    """The class of the reward of this name or reference.  Raises ValueError, naming the nearest, if there is none."""
    if ":" not in name:
        return find_class(GROUP, name, Reward)  # type: ignore[type-abstract]  # its subclasses are not
    found = imported(name)
    if not (isinstance(found, type) and issubclass(found, Reward)):
        raise ValueError(f'the key "reward" names a class of rewards; {name} is {found!r}. Pass the reference itself')
    return found


def reward_from_dict(data: Mapping[str, Any]) -> Reward:
    """The reward that `data` describes, found by its name under the key "reward"."""
    if not isinstance(data, Mapping) or not isinstance(data.get("reward"), str):
        raise ValueError(f'a reward is a mapping with a key "reward", e.g. {{"reward": "clip-score"}}; got {data!r}')
    return get_reward(data["reward"]).from_dict(data)


def as_reward(value: Any) -> Callable[..., Tensor]:
    """The callable that `value` stands for.

    value: a `Reward`, any callable, a registered name, a dictionary, or a reference "package.module:function", which is
    imported.  Raises ValueError that says what was given and the mend.
    """
    if isinstance(value, str):
        return as_reward(imported(value)) if ":" in value else get_reward(value).from_dict({})
    if isinstance(value, Mapping):
        return reward_from_dict(value)
    if isinstance(value, type):
        raise ValueError(
            f"a reward is an object, and {value.__name__} is a class; build one, with its settings: {value.__name__}()"
        )
    if not callable(value):
        raise ValueError(f"a reward is {_KINDS}; got {value!r}")
    return cast(Callable[..., Tensor], value)


def plain(value: Any) -> dict[str, Any] | str:
    """The reward as plain data, which `as_reward` reads: our dictionary, or a function's "package.module:function".

    Raises ValueError for what cannot be found again by a name: lambdas, closures, partials, bound methods, objects.
    """
    reward = as_reward(value)
    if isinstance(reward, Reward):
        if "<locals>" in type(reward).__qualname__:
            raise ValueError(f"{_unwritable(reward)} its class is defined inside a function")
        return reward.to_dict()
    reference = _reference(reward)
    try:
        same = reference is not None and imported(reference) is reward
    except ValueError:
        same = False
    if reference is None or not same:
        raise ValueError(f"{_unwritable(reward)} nothing imports it by a name")
    if reference.startswith("__main__:"):
        raise ValueError(f"{_unwritable(reward)} it belongs to the script that runs now")
    return reference


def imported(reference: str) -> Any:
    """What "package.module:name" refers to.  Raises ValueError that says which part is missing."""
    module_name, _, path = reference.partition(":")
    try:
        module = import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise ValueError(
            f"the reward {reference!r} cannot be imported ({error}); a reference is package.module:function, of an "
            "installed package or a module in the working folder"
        ) from error
    try:
        return functools.reduce(getattr, path.split("."), module)
    except AttributeError:
        raise ValueError(f"the reward {reference!r} does not exist: {module_name} has no {path!r}") from None


def name_of(reward: Any) -> str:
    """What messages and reports call a reward: our name, or the function's."""
    if isinstance(reward, Reward):
        return reward.name
    if isinstance(reward, functools.partial):
        return f"partial of {name_of(reward.func)}"
    reference = _reference(reward)
    return reference.removeprefix("__main__:") if reference else type(reward).__qualname__


def _reference(function: Any) -> str | None:
    module, path = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return f"{module}:{path}" if isinstance(module, str) and isinstance(path, str) else None


def _unwritable(reward: Any) -> str:
    return (
        f"the reward {name_of(reward)} can be used, but not written down. Define it as a function at the top of a "
        "module, or as a frozen dataclass that subclasses ImageReward there:"
    )


RewardField = Annotated[
    Any,
    BeforeValidator(as_reward),
    PlainSerializer(plain),
    WithJsonSchema(
        {
            "description": "a reward's name, its dictionary, or a reference package.module:function",
            "anyOf": [
                {"type": "string"},
                {"type": "object", "properties": {"reward": {"type": "string"}}, "required": ["reward"]},
            ],
        }
    ),
]
"""The type of a dataclass field that holds a reward: `reward: RewardField`."""
