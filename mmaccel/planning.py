"""`plan`: how many visual tokens and how large a language model a compute budget should buy.

Source: Li et al., "Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters", ICLR 2025 (arXiv:2411.03312):
models trained with token compression, Qwen-1.5 language models behind CLIP-L/14 at 336 px.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Task = Literal["reasoning", "ocr"]
MOST = 1e40  # floating-point operations, or parameters
MOST_TOKENS = 576  # what the uncompressed models read
SIZES = (0.5e9, 14e9)  # fitted to 7e9; the paper finds its prediction for 14e9 within 2 %


@dataclass(frozen=True)
class ScalingLaw:
    """error = factor / (N^alpha T^beta): N in billions of parameters of the language model, T visual tokens an image.

    Our least-squares fit of the paper's published accuracies (4 sizes, 7 token counts); it presses the additive
    constant of the paper's form to 0.  Accuracies are means over benchmarks, so the error is one in [0, 1].
    """

    factor: float
    alpha: float
    beta: float

    def error(self, parameters: float, tokens: float) -> float:
        """The error that the law predicts."""
        return self.factor / (math.pow(parameters / 1e9, self.alpha) * math.pow(tokens, self.beta))

    def best_tokens(self, text_tokens: float) -> float:
        """The number of visual tokens that minimises the error at fixed compute 2 N (Q + T), not bounded to the fit.

        T* = Q beta / (alpha - beta); infinite where the error depends more on tokens than on parameters.
        """
        if self.alpha <= self.beta:
            return math.inf
        return text_tokens * self.beta / (self.alpha - self.beta)


LAWS: dict[Task, ScalingLaw] = {
    "reasoning": ScalingLaw(0.5908, 0.0709, 0.0151),
    "ocr": ScalingLaw(0.9151, 0.0271, 0.0386),
}
"""By the kind of question.  The paper's figure has alpha = 0.077 and beta = 0.015 for reasoning."""


@dataclass(frozen=True)
class Plan:
    """What a compute budget should buy.

    visual_tokens: an image.  parameters: of the language model.  flops: of one forward, 2 N (Q + T).
    error: what the law predicts.  over_full: that over the error of the same compute spent on 576 visual tokens; below
    1, compressing pays.  warnings: where this leaves what the law was fitted on.
    """

    visual_tokens: int
    parameters: float
    flops: float
    error: float
    over_full: float
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.visual_tokens} visual tokens an image, {self.parameters / 1e9:.3g} B parameters of the language "
            f"model: {self.flops / 1e12:.3g} TFLOP a forward",
            f"predicted error {self.error:.3f}, {self.over_full:.3f} of {MOST_TOKENS} tokens' at the same compute",
        ]
        return "\n".join([*lines, *(f"note: {warning}" for warning in self.warnings)])


def plan(flops: float, text_tokens: int, task: Task = "reasoning", sizes: Sequence[float] = ()) -> Plan:
    """The visual tokens and the language-model size of least predicted error within a compute budget.

    flops: floating-point operations of one forward of the language model, 2 N (Q + T).  text_tokens: Q, those beside
    the image that are computed anew; 0 for a cached prompt.  task: "reasoning" or "ocr".
    sizes: parameters of the models that there are, e.g. (0.5e9, 7e9); without them the size is free.
    The law holds for models *trained* with compressed tokens: for a training-free method on a given model it is the
    limit to compare with, no forecast.  The vision encoder's compute is not in it.
    Raises ValueError for a budget that no size affords, or values out of range.
    """
    if task not in LAWS:
        raise ValueError(f"the law is fitted for {', '.join(LAWS)}; got {task!r}")
    if not all(1 <= amount <= MOST for amount in (flops, *sizes)) or text_tokens < 0:
        raise ValueError(
            f"flops and sizes lie between 1 and {MOST:g}, text_tokens from 0 up; got flops={flops!r}, "
            f"text_tokens={text_tokens!r}, sizes={tuple(sizes)!r}"
        )
    law = LAWS[task]

    def bought(tokens: int, parameters: float) -> tuple[float, int, float]:
        return law.error(parameters, tokens), tokens, parameters

    if sizes:
        most = text_tokens + MOST_TOKENS
        afforded = [(size, math.floor(min(flops / (2 * size), most)) - text_tokens) for size in sizes]
        offers = [bought(tokens, size) for size, tokens in afforded if tokens >= 1]
        if not offers:
            least = 2 * min(sizes) * (text_tokens + 1)
            raise ValueError(
                f"flops={flops:.3g} affords none of the sizes with even one visual token; the smallest needs "
                f"{least:.3g}"
            )
        error, tokens, parameters = min(offers)
    else:
        ideal = min(max(law.best_tokens(text_tokens), 1), MOST_TOKENS)
        places = {math.floor(ideal), math.ceil(ideal)}
        error, tokens, parameters = min(bought(count, flops / (2 * (text_tokens + count))) for count in places)
    full = law.error(flops / (2 * (text_tokens + MOST_TOKENS)), MOST_TOKENS)
    spent = 2 * parameters * (text_tokens + tokens)
    return Plan(tokens, parameters, spent, error, error / full, _warnings(law, tokens, parameters))


def _warnings(law: ScalingLaw, tokens: int, parameters: float) -> tuple[str, ...]:
    found = []
    if not SIZES[0] <= parameters <= SIZES[1]:
        low, high = (size / 1e9 for size in SIZES)
        found.append(
            f"{parameters / 1e9:.3g} B parameters lie outside the {low:g} to {high:g} B that the law was tested on"
        )
    if law.alpha <= law.beta:
        found.append("for this task tokens are worth more than parameters: at fixed compute, do not compress")
    return tuple(found)
