"""Entropic annealing: temper the weights while a filter is young and about to bet on a few particles too soon.

Source: "Mitigating Premature Exploitation in Particle-based Monte Carlo for Inference-Time Scaling" (ePF,
arXiv:2510.05825), as its released code computes it.  We differ in one point: the paper's ancestors are drawn from the
tempered weights and the weights are then forgotten, which changes the distribution that the filter samples.
`diffusion.particle_filter` keeps, for every copy, the ratio (1 - 1/T) log w that tempering left unpaid, and so samples
what it would have sampled without.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from diffusion.resampling import normalised

Rule = Literal["ess", "entropy", "base"]

CLIP = 1e-7
"""The released code keeps probabilities this far from 0 and 1 in its statistics."""


def temperature(
    log_weights: Float64[Tensor, "particles"], progress: float, rule: Rule = "ess", early: float = 0.5, low: float = 0.5
) -> float:
    """The temperature to resample at, at least 1; above 1 only if `progress` < early and ESS / N < low.

    progress: steps done, this one included, over all steps.
    ess: (1 - progress) N / ESS.  entropy: 1 / (H + (1 - H) progress), H normalised.  base: 2 - progress.
    """
    share = clipped_effective_sample_size(log_weights) / len(log_weights)
    if len(log_weights) < 2 or progress >= early or share >= low:
        return 1.0
    if rule == "ess":
        return max(1.0, (1 - progress) / share)
    if rule == "entropy":
        entropy = normalised_entropy(log_weights)
        return max(1.0, 1 / (entropy + (1 - entropy) * progress))
    return max(1.0, 2 - progress)


def clipped_effective_sample_size(log_weights: Float64[Tensor, "particles"]) -> float:
    """1 / sum p², with p kept off 0 and 1."""
    return float(1 / normalised(log_weights).clamp(CLIP, 1 - CLIP).square().sum())


def normalised_entropy(log_weights: Float64[Tensor, "particles"]) -> float:
    """-sum p log p over log N, in [0, 1]; for one or two particles not divided, as in the released code."""
    p = normalised(log_weights).clamp(CLIP, 1 - CLIP)
    entropy = float(-(p * torch.log(p)).sum())
    return entropy / math.log(len(p)) if len(p) > 2 else entropy
