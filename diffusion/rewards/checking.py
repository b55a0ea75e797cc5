"""The one place with the rule for wrong rewards.

A reward gives one real number a row.  NaN and infinities of either sign count as minus infinity: such a row never wins,
and the report says how many there were.  Anything else that is wrong stops the search, by name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from diffusion.rewards.base import Prompts, as_reward
from mmaccel.named import name_of


class Scores(NamedTuple):
    """What a reward gave: `values` [rows], float64 on the CPU, and how many of them were not finite."""

    values: Float64[Tensor, " rows"]
    not_finite: int


def scored(reward: Any, images: Tensor, prompts: Prompts, **context: Any) -> Scores:
    """Calls the reward and checks what it gives.  An error of the reward's own passes through, with a note.

    reward: anything that `as_reward` takes.
    """
    reward = as_reward(reward)
    try:
        given = reward(images, prompts, **context)
    except Exception as error:
        error.add_note(f"raised by the reward {name_of(reward)} for {len(images)} rows, images {list(images.shape)}")
        raise
    return checked(given, len(images), reward)


def checked(rewards: Any, rows: int, reward: Any = None) -> Scores:
    """What a reward gave, as numbers that can be compared.

    rewards: [rows], a tensor of any dtype and device, a list or an array.  reward: whose they are, for the message.
    Raises TypeError unless they are real numbers, ValueError unless there is one a row.
    """
    who = "the reward" if reward is None else f"the reward {name_of(reward)}"
    expected = f"{who} has to give one real number a row, [{rows}]"
    if rewards is None:
        raise TypeError(f"{expected}; got None. Does it lack its return?")
    if not isinstance(rewards, Tensor):
        rewards = _as_tensor(rewards, expected)
    if rewards.is_complex():
        raise TypeError(f"{expected}; got {rewards.dtype}. Give its real part or its magnitude")
    if list(rewards.shape) != [rows]:
        mend = _mend(list(rewards.shape), rows)
        raise ValueError(f"{expected}; got the shape {list(rewards.shape)}. {mend}")
    values = rewards.detach().to("cpu", torch.float64)
    finite = values.isfinite()
    return Scores(values.masked_fill(~finite, -torch.inf), int((~finite).sum()))


def _as_tensor(rewards: Any, expected: str) -> Tensor:
    if isinstance(rewards, list | tuple):  # of tensors on any device, perhaps
        rewards = [value.detach().tolist() if isinstance(value, Tensor) else value for value in rewards]
    try:
        array = np.asarray(rewards)
    except ValueError:
        raise ValueError(f"{expected}; got a list of lists that differ in length") from None
    if array.size == 0 and array.ndim == 1:
        return torch.zeros(0, dtype=torch.float64)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{expected}; got {type(rewards).__name__} {rewards!r:.80}. Give a tensor of floats")
    return torch.from_numpy(np.array(array, dtype=np.float64))  # a copy: arrays may be read-only or strided backwards


def _mend(shape: list[int], rows: int) -> str:
    if shape == []:
        return "A single number says nothing about each row: do not average over the rows"
    if shape[0] == rows:
        return "Average over the other axes, or squeeze them: rewards.flatten(1).mean(dim=1)"
    return "Give the rewards in the order of the rows of `images`"
