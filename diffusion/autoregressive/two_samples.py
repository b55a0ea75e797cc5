"""Do two sets of samples come from the same distribution?"""

from __future__ import annotations

import torch
from torch import Tensor


def energy_test(first: Tensor, second: Tensor, permutations: int = 400, seed: int = 0) -> tuple[float, float]:
    """The energy distance of samples [n, ...] and [m, ...], and the p-value of its permutation test.

    The statistic 2 E|X-Y| - E|X-X'| - E|Y-Y'| is 0 only for equal distributions; permuting which sample a point belongs
    to gives its null distribution.  Source: Szekely and Rizzo 2004.
    """
    points = torch.cat([first, second]).flatten(1).double()
    distances = torch.cdist(points, points).float()
    signs = torch.cat([torch.full((len(first),), 1 / len(first)), torch.full((len(second),), -1 / len(second))])
    generator = torch.Generator().manual_seed(seed)
    shuffles = torch.stack([torch.randperm(len(points), generator=generator) for _ in range(permutations)])
    weights = torch.cat([signs[None], signs[shuffles]])
    statistics = -(weights @ distances * weights).sum(dim=1)
    above = 1 + int((statistics[1:] >= statistics[0]).sum())
    return float(statistics[0]), above / (permutations + 1)
