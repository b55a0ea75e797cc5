"""What a reward is, and how it is written down.

A reward is any callable `reward(images, prompts, **context) -> [rows]`, the higher the better.
images: floats in 0..1, [rows, 3, height, width], or for video [rows, frames, 3, height, width].
prompts: one a row, None where the pipeline has none.
context: whatever else the search can tell; rewards ignore what they do not know.

A search built in Python takes any callable.  One that is written down needs a reward that can be found again: one of
ours, a dataclass as plain as a method, or a function at the top of a module (`mmaccel.named`).
"""

from __future__ import annotations

import dataclasses
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeAlias

from torch import Tensor

from mmaccel import named
from mmaccel.named import Named, NamedField, named_class, named_from_dict, resolve
from mmaccel.registry import entries

Prompts: TypeAlias = Sequence[str | None]


class Reward(Named):
    """Base class of our rewards.  Subclasses are frozen, keyword-only dataclasses; their fields are the settings.

    Models that a reward needs are loaded at its first call and shared by equal settings (`diffusion.rewards.models`);
    the object itself stays as small as its settings.
    """

    kind: ClassVar[str] = "reward"
    called: ClassVar[str | None] = "reward(images, prompts, **context)"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            value = getattr(self, field.name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, field.name, os.fspath(value))  # plain data, before anyone has seen the object

    @abstractmethod
    def __call__(self, images: Tensor, prompts: Prompts | None, **context: Any) -> Tensor:
        """The reward of every row, [rows], float32 on the device of the images."""


RewardField = Annotated[Any, NamedField(Reward)]
"""The type of a dataclass field that holds a reward: `reward: RewardField`."""


def list_rewards() -> list[str]:
    """The names of all installed rewards, ours and third parties', sorted.  Imports none of them."""
    return sorted(entries(Reward.group()))


def get_reward(name: str) -> type[Reward]:
    """The class of the reward of this name or reference.  Raises ValueError, naming the nearest, if there is none."""
    return named_class(name, Reward)


def reward_from_dict(data: Mapping[str, Any]) -> Reward:
    """The reward that `data` describes, found by its name under the key "reward"."""
    found: Reward = named_from_dict(data, Reward)
    return found


def as_reward(value: Any) -> Callable[..., Tensor]:
    """The callable that `value` stands for: a `Reward`, any callable, a name, a dictionary, or a reference.

    Raises ValueError that says what was given and the mend.
    """
    reward: Callable[..., Tensor] = resolve(value, Reward)
    return reward


def plain(value: Any) -> dict[str, Any] | str:
    """The reward as plain data, which `as_reward` reads.  Raises ValueError for what no name leads to: a lambda."""
    return named.plain(value, Reward)
