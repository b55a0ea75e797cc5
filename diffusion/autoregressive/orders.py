"""In which order tokens are drawn, how many at a step, and how strong the guidance is on the way."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor


def tokens_a_step(tokens: int, steps: int) -> list[int]:
    """MAR's cosine schedule: after step k, floor(tokens cos(pi/2 (k+1)/steps)) tokens are still hidden.

    At least one token a step; the last step draws all that remain.  steps = tokens draws one at a time.
    Source: arXiv:2406.11838, section 3.5, and its release for the bounds.
    Raises ValueError unless there are 1 to `tokens` steps.
    """
    hidden = [*_hidden_after(tokens, steps)[:-1], 0]
    return [before - after for before, after in zip([tokens, *hidden], hidden, strict=False)]


def _hidden_after(tokens: int, steps: int) -> list[int]:
    if not 1 <= steps <= tokens:
        raise ValueError(f"a picture of {tokens} tokens is drawn in 1 to {tokens} steps; got {steps!r}")
    hidden = [tokens]
    for step in range(steps):
        due = math.floor(tokens * math.cos(math.pi / 2 * (step + 1) / steps))
        hidden.append(max(1, min(hidden[-1] - 1, due)))
    return hidden[1:]


def guidance_by_token(
    guidance: float, schedule: Literal["linear", "constant"], tokens: int, steps: int
) -> Float64[Tensor, "tokens"]:
    """The guidance scale that each token is drawn with, in the order of drawing.

    linear: it rises from 1 with the share of tokens that are drawn after the step, 1 + (g - 1) (N - M_k) / N.
    """
    if schedule == "constant":
        return torch.full((tokens,), float(guidance), dtype=torch.float64)
    hidden = torch.tensor(_hidden_after(tokens, steps), dtype=torch.float64)
    scale = 1 + (guidance - 1) * (tokens - hidden) / tokens
    return scale.repeat_interleave(torch.tensor(tokens_a_step(tokens, steps)))
