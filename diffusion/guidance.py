"""How a pipeline combines its denoiser's outputs into what the scheduler steps with: found out, then verified.

The outputs of a step are known (the tap made them up), and so is the `model_output` that reached the scheduler.  The
rules below are tried until one reproduces it exactly.  Nothing is assumed from the pipeline's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["none", "spread", "length"]


@dataclass(frozen=True)
class Rule:
    """model_output = sign * first(normed(u + scale (c - u))).

    conditional, unconditional: which of a step's outputs are c and u; without u, the output is c.
    norm: "spread" rescales towards c's standard deviation by `rescale` (Lin et al. 2023, section 3.4), "length" gives
    every token c's length (QwenImage).
    channels: only the first so many, along dimension 1, are the prediction; the others are a learned variance.
    """

    conditional: int = 0
    unconditional: int | None = None
    scale: float = 1.0
    norm: Norm = "none"
    rescale: float = 0.0
    channels: int | None = None
    sign: int = 1

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """What the scheduler gets, from the outputs of one step's evaluations, [rows, ...] each."""
        condition = outputs[self.conditional]
        guided = condition
        if self.unconditional is not None:
            without = outputs[self.unconditional]
            guided = without + self.scale * (condition - without)
        if self.norm == "spread":
            axes = list(range(1, condition.ndim))
            same = guided * (condition.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
            guided = self.rescale * same + (1 - self.rescale) * guided
        elif self.norm == "length":
            guided = guided * (torch.norm(condition, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True))
        if self.channels is not None:
            guided = guided[:, : self.channels]
        return guided if self.sign == 1 else -guided


def find_rule(outputs: Sequence[Tensor], model_output: Tensor, numbers: Sequence[float]) -> Rule | None:
    """The rule that makes `model_output` of one step's outputs, exactly, or None.

    numbers: those that the call knows under names of guidance; scales and rescalings are among them.
    """
    cast = [output.to(model_output.dtype) for output in outputs]
    for rule in _rules(len(cast), cast[0], model_output, list(dict.fromkeys(numbers))):
        made = rule.combine(cast)
        if made.shape == model_output.shape and torch.equal(made, model_output):
            return rule
    return None


def _rules(count: int, output: Tensor, model_output: Tensor, numbers: Sequence[float]) -> Iterator[Rule]:
    learned = output.ndim > 1 and output.shape[1] == 2 * model_output.shape[1]
    channels = model_output.shape[1] if learned else None
    for sign in (1, -1):
        if count == 1:
            yield Rule(channels=channels, sign=sign)
        if count == 2:
            for conditional, unconditional in ((1, 0), (0, 1)):
                for scale in numbers:
                    guided = Rule(conditional, unconditional, scale, channels=channels, sign=sign)
                    yield guided
                    yield replace(guided, norm="length")
                    for rescale in numbers:
                        yield replace(guided, norm="spread", rescale=rescale)
