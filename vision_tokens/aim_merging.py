"""AIM's merging: rounds of bipartite matching that halve the tokens of each picture or frame.

Source: "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning", ICCV 2025 (arXiv:2412.03248),
section on token merging, and the released code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_tokens.layout import Layout, Merged
from vision_tokens.matching import match, merge


def merge_cells(
    features: Float[Tensor, "partitions cells channels"], layout: Layout, kept: Int[Tensor, " partitions"]
) -> Merged:
    """Merges each partition's cells, down to as many as `kept` says; padding of tiles takes no part.

    A merged token sits on the cell of the token that others merged into, and tokens stay in the order of their cells:
    the release leaves those that found no partner in front, in order of similarity, where there are any.
    """
    valid = layout.valid()
    have = valid.sum(dim=-1)
    seats = torch.zeros_like(valid)
    out = torch.zeros_like(features)
    for count, goal in set(zip(have.tolist(), kept.tolist(), strict=True)):
        rows = ((have == count) & (kept == goal)).nonzero()
        cells = valid[rows[:, 0]].nonzero()[:, 1].view(len(rows), count)
        merged, places = merge_rounds(features[rows, cells], rounds(count, goal))
        taken = cells.gather(1, places)
        seats[rows, taken] = True
        out[rows, taken] = merged
    return Merged(seats, out[seats])


def rounds(tokens: int, kept: int) -> list[int]:
    """How many tokens each round merges away: a half, a quarter, an eighth of all, ... the last as many as are left.

    The counts come from the original number, as in the released code: 169 -> 85 -> 43 -> 22.
    """
    counts: list[int] = []
    while (left := tokens - sum(counts)) > max(kept, 1):
        counts.append(min(max(tokens >> (len(counts) + 1), 1), left // 2, left - kept))
    return counts


def merge_rounds(
    tokens: Float[Tensor, "frames tokens channels"], merged: Sequence[int]
) -> tuple[Float[Tensor, "frames left channels"], Int[Tensor, "frames left"]]:
    """Rounds of merging that take so many tokens away from each frame; and the place that each token left had.

    In each round tokens at even places merge into the most similar ones at odd places, which become plain means: a
    later round forgets how many tokens a token stands for.  Frames never mix.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    for count in merged:
        matching = match(tokens.float(), count)
        tokens, _ = merge(tokens, matching)
        places = places.gather(1, matching.seats)
    return tokens, places
