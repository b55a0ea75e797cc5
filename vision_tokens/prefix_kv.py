"""PrefixKV: shrink each layer's key-value cache so far that all layers keep the same share of their attention.

Source: Wang et al., "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient
Generation", NeurIPS 2025 (arXiv:2412.03409), and its released code, which also says what happens while decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vision_tokens.cache_methods import CacheMethod, Eviction
from vision_tokens.layer_view import LayerView

TOLERANCE = 5
"""The search stops when it is fewer tokens than this, of all layers together, away from its target."""

PUBLISHED_LLAVA_7B = (
    0.89, 0.76, 0.66, 0.42, 0.43, 0.30, 0.51, 0.55, 0.55, 0.62, 0.66, 0.71, 0.57, 0.53, 0.51, 0.56,
    0.48, 0.47, 0.43, 0.36, 0.50, 0.24, 0.36, 0.32, 0.33, 0.39, 0.32, 0.36, 0.52, 0.40, 0.61, 0.72,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PrefixKV(CacheMethod):
    """Evict from each layer's cache the tokens that get little attention, all layers keeping the same share of it.

    budget: the share of the whole cache that stays; how it is divided among the layers is found anew in every prompt.
        0.5 if neither this nor `layers` is given.
    layers: the share that stays in each layer, from `PrefixKV.calibrated` or a preset, in place of a budget.
    start, end: so many tokens at the start of the sequence, and at the end of each prompt, are never evicted with the
        prompt.
    distance: while decoding, the cache grows by the layer's share of a token a step: room is made at one place, so
        far behind the end of the pruned prompt (its middle, if that is outside); a positive one counts from the start.
    positions: "kept" gives new tokens the positions that they have in the sequence; "drifting" counts what the first
        layer still holds, as the released code does.

    Padding neither counts nor is protected, and rows of a batch hold their own tokens; the released code knows one row.
    A later prompt on the same cache is pruned by itself.  Layers with a window are pruned with the prompt, and then
    left to their window.
    """

    name: ClassVar[str] = "prefix-kv"
    ranks_by_all: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"llava-1.5-7b-50": {"layers": PUBLISHED_LLAVA_7B}}

    budget: float | None = None
    layers: tuple[float, ...] | None = None
    start: int = 1
    end: int = 1
    distance: int = -25
    positions: Literal["kept", "drifting"] = "kept"

    def __post_init__(self) -> None:
        if self.budget is not None and self.layers is not None:
            raise ValueError("give prefix-kv a budget, or layers, the share that each of them keeps; got both")
        for share in (self.kept_share,) if self.layers is None else self.layers:
            if not isinstance(share, float) or not 0 < share <= 1:
                raise ValueError(
                    f"the share of a cache that prefix-kv keeps lies in (0, 1]; got {share!r}. For all of it say 1.0"
                )
        for name in ("start", "end"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}, a number of tokens, is 0 or more; got {getattr(self, name)!r}")
        if self.positions not in ("kept", "drifting"):
            raise ValueError(f"positions are 'kept' or 'drifting'; got {self.positions!r}")

    @property
    def kept_share(self) -> float:
        if self.layers is not None:
            return sum(self.layers) / len(self.layers)
        return 0.5 if self.budget is None else self.budget

    def with_budget(self, budget: float) -> Self:
        return dataclasses.replace(self, budget=budget, layers=None)

    @property
    def profile(self) -> Sequence[float] | None:
        return self.layers

    def score(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        return received(view)

    def plan(
        self, scores: Float[Tensor, "layers tokens"], lengths: Sequence[int], layers: Sequence[int], first: bool
    ) -> Eviction:
        start = self.start if first else 0
        if self.layers is None:
            target = (1 - self.kept_share) * sum(lengths)
            counts = rescaled(searched_evictions(scores, lengths, target, start + self.end), target)
            shares = [count / length for count, length in zip(counts, lengths, strict=True)]
        else:
            shares = [1 - self.layers[layer] for layer in layers]
        counts = [
            min(round(share * length), max(0, length - start - self.end))
            for share, length in zip(shares, lengths, strict=True)
        ]
        return Eviction(keep_most_attended(scores, lengths, counts, start, self.end), counts, shares)

    def slot(self, kept: int) -> int:
        return slot_of(kept, self.distance)

    @classmethod
    def calibrated(cls, model: Any, samples: Iterable[Mapping[str, Any]], budget: float = 0.5, **settings: Any) -> Self:
        """The method with the shares that the layers get, on average, in these prompts (the paper's offline estimate).

        samples: arguments of the model's call.  The paper finds the same with one sample as with twenty.
        Raises ValueError without samples.
        """
        from mmaccel.api import applied

        found: list[list[float]] = []
        with applied(model, cls(budget=budget, **settings)) as run, torch.no_grad():
            for inputs in samples:
                model.generate(**inputs, max_new_tokens=1, do_sample=False)
                found += run.report.details["evicted_shares"]
        if not found:
            raise ValueError("a profile needs at least one prompt; pass samples=[{'input_ids': ..., ...}]")
        return cls(layers=tuple(round(1 - float(share), 6) for share in np.mean(found, axis=0)), **settings)


def received(view: LayerView) -> Float[Tensor, "batch tokens"]:
    """The attention that each token gets, summed over all tokens of the prompt, averaged over heads, in float32."""
    total = torch.zeros(view.real.shape, dtype=torch.float32, device=view.query.device)
    for _, rows in view.blocks():
        total[:, : rows.shape[-1]] += rows.sum(dim=(1, 2))
    return total / view.query.shape[1]


def searched_evictions(
    scores: Float[Tensor, "layers tokens"], lengths: Sequence[int], target: float, protected: int
) -> list[int]:
    """How many tokens each layer evicts when all keep the share p of their attention; p by binary search.

    scores: the attention that each token gets; of every layer the first `lengths` count, and the others are zero.
    target: how many tokens to evict in all layers together.
    protected: how many tokens a layer keeps anyway; the search knows their number alone.
    Source: the paper's section 3.3.  The released code, and we, stop within `TOLERANCE` of the target.
    """
    ranked = scores.sort(dim=-1, descending=True).values
    curves = (ranked / ranked.sum(dim=-1, keepdim=True)).cumsum(dim=-1).cpu()
    low, high, counts = 0.0, 1.0, [0] * len(curves)
    while low < (middle := (low + high) / 2) < high:
        prefixes = torch.searchsorted(curves, torch.full((len(curves), 1), middle))[:, 0] + 1
        counts = [
            max(0, length - prefix - protected) for length, prefix in zip(lengths, prefixes.tolist(), strict=True)
        ]
        if abs(sum(counts) - target) < TOLERANCE:
            break
        if sum(counts) < target:
            high = middle
        else:
            low = middle
    return counts


def rescaled(counts: Sequence[int], target: float) -> list[int]:
    """The counts in proportion, so that they sum up to the target, less what truncation takes."""
    total = sum(counts)
    return [int(count * target / total) if total else 0 for count in counts]


def keep_most_attended(
    scores: Float[Tensor, "layers tokens"], lengths: Sequence[int], counts: Sequence[int], start: int, end: int
) -> Bool[Tensor, "layers tokens"]:
    """Which of each layer's first `lengths` tokens stay when the `counts` least attended go; of equals the later stay.

    The first `start` and the last `end` of them are not among those that go.
    """
    places = torch.arange(scores.shape[1], device=scores.device)
    length, count = (torch.tensor(values, device=scores.device)[:, None] for values in (lengths, counts))
    free = (places >= start) & (places < length - end)
    rank = scores.masked_fill(~free, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
    return (~free | (rank >= count)) & (places < length)


def slot_of(kept: int, distance: int) -> int:
    """The place in a pruned prompt of `kept` tokens where room is made while decoding."""
    if distance > 0:
        return distance
    return kept + distance if kept + distance >= 1 else kept // 2
