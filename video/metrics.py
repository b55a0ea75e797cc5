"""How good a keyframe search is, in time and in looks, as LV-Haystack defines it.

Source: T* (arXiv:2504.02259), section 3, and its released script.  Where we differ from the script: pictures are those
*at* the seconds, not those of which the seconds are the index, and SSIM runs over height and width, not over width and
colour; so its published visual figures cannot be compared with ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from mmaccel.bench import Figure, mean

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian, pixels
C1, C2 = 0.01**2, 0.03**2  # SSIM's constants for values in [0, 1]
TOLERANCE = 5.0  # seconds


@dataclass(frozen=True)
class Agreement:
    """Precision, recall and F1, each in [0, 1]."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall; 0 if both are."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def temporal(annotated: ArrayLike, predicted: ArrayLike, tolerance: float = TOLERANCE) -> Agreement | None:
    """How far predicted times agree with annotated ones, at most `tolerance` seconds apart, both ends included.

    precision: the share of predictions near any annotation; recall: the share of annotations near any prediction.
    None without annotations or predictions: such a question is left out of averages, and its share is reported.
    LV-Haystack truncates both sides to whole seconds, which makes the tolerance one second fuzzy; pass `np.trunc(...)`
    for its figures.
    """
    apart = _apart(annotated, predicted)
    if apart is None:
        return None
    near = apart <= tolerance
    return Agreement(float(near.any(0).mean()), float(near.any(1).mean()))


def distances(annotated: ArrayLike, predicted: ArrayLike) -> tuple[float, float] | None:
    """Mean seconds from a prediction to the nearest annotation, and from an annotation to the nearest prediction."""
    apart = _apart(annotated, predicted)
    return None if apart is None else (float(apart.min(0).mean()), float(apart.min(1).mean()))


def _apart(annotated: ArrayLike, predicted: ArrayLike) -> NDArray[np.float64] | None:
    """Seconds between each annotated and each predicted time, [annotated, predicted]."""
    sides = [np.asarray(times, dtype=np.float64).reshape(-1) for times in (annotated, predicted)]
    return np.abs(sides[0][:, None] - sides[1][None]) if all(len(side) for side in sides) else None


def visual(annotated: Sequence[NDArray[np.uint8]], predicted: Sequence[NDArray[np.uint8]]) -> Agreement | None:
    """How far predicted pictures look like annotated ones: mean best SSIM of a prediction, and of an annotation.

    Pictures are uint8 [height, width, 3], all of one size; SSIM rises as pictures are made smaller, so state the size.
    None without annotations or predictions.  Raises ValueError for pictures of different sizes.
    """
    if not len(annotated) or not len(predicted):
        return None
    table = similarities(annotated, predicted)
    return Agreement(float(table.max(0).mean()), float(table.max(1).mean()))


def similarities(first: Sequence[NDArray[np.uint8]], second: Sequence[NDArray[np.uint8]]) -> NDArray[np.float64]:
    """SSIM of every picture of `first` with every one of `second`, [first, second].

    Gaussian window of 11 pixels and 1.5 standard deviation, zero padding, biased local variances, mean over colours and
    pixels (Wang et al. 2004).  Raises ValueError for pictures of different sizes.
    """
    sizes = {np.asarray(picture).shape for picture in (*first, *second)}
    if len(sizes) != 1:
        raise ValueError(
            f"SSIM compares pictures of one size; got {sorted(sizes)}. Read both sides with the same `short`"
        )
    one, other = (
        rearrange(torch.from_numpy(np.stack(side)).float() / 255, "n height width colour -> n colour height width")
        for side in (first, second)
    )
    mean_one, mean_other = _smoothed(one), _smoothed(other)
    spread_one, spread_other = _smoothed(one**2) - mean_one**2, _smoothed(other**2) - mean_other**2
    rows = []
    for row in range(len(one)):  # a row at a time: pairs of large pictures do not fit into memory together
        both = _smoothed(one[row] * other) - mean_one[row] * mean_other
        light = (2 * mean_one[row] * mean_other + C1) / (mean_one[row] ** 2 + mean_other**2 + C1)
        structure = (2 * both + C2) / (spread_one[row] + spread_other + C2)
        rows.append((light * structure).mean(dim=(1, 2, 3)))
    return torch.stack(rows).double().numpy()


def window() -> Tensor:
    """SSIM's Gaussian along one axis, [11], with sum 1."""
    offsets = torch.arange(WINDOW) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    return weights / weights.sum()


def _smoothed(pictures: Tensor) -> Tensor:
    """Gaussian means around every pixel, zeros beyond the border: [n, colour, height, width]."""
    kernel = torch.outer(window(), window()).expand(3, 1, WINDOW, WINDOW)
    return functional.conv2d(pictures, kernel, padding=WINDOW // 2, groups=3)


@dataclass(frozen=True)
class Summary:
    """Averages over questions with 95 % intervals.

    f1: the mean of the questions' F1, as LV-Haystack averages in time.  f1_of_means: the harmonic mean of the mean
    precision and the mean recall, as it averages looks.  skipped: the share of questions left out.
    """

    precision: Figure
    recall: Figure
    f1: Figure
    f1_of_means: float
    skipped: float


def summary(found: Sequence[Agreement | None]) -> Summary:
    """The averages of many questions; those with nothing to compare are skipped and counted.

    Raises ValueError if all are.
    """
    counted = [agreement for agreement in found if agreement is not None]
    if not counted:
        raise ValueError(f"none of {len(found)} questions has both annotated and predicted frames; nothing to average")
    precision, recall, f1 = (
        mean([getattr(agreement, name) for agreement in counted]) for name in ("precision", "recall", "f1")
    )
    of_means = Agreement(precision.value, recall.value).f1
    return Summary(precision, recall, f1, of_means, 1 - len(counted) / len(found))
