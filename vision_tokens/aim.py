"""AIM: merge visual tokens, then rank them by a PageRank over attention and let fewer into each layer, down to none.

Source: "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning", ICCV 2025 (arXiv:2412.03248), and
the released code, which masks tokens inside the language model; here they leave the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from mmaccel.budgets import Budget
from mmaccel.methods import Unsupported
from vision_tokens.aim_merging import merge_cells
from vision_tokens.decoder_layers import DecoderMethod, solved
from vision_tokens.language_input import MergingMethod
from vision_tokens.layer_view import LayerView
from vision_tokens.layout import ImageView, Merged

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment

MERGING_PART = math.log(0.25) / math.log(0.25 * 18.5 / 28)
"""The part of the reduction that merging has, on a logarithmic scale, in the paper's setting for video: merged to 0.25,
and a mean of 18.5 of 28 layers' work on what is left."""

Blocks = Iterable[tuple[int, Float[Tensor, "batch heads _ _"]]]
"""Rows of an attention matrix from the last to the first, each block with the place of its first row."""


@dataclass(frozen=True, kw_only=True)
class AIM(DecoderMethod):
    """Merge visual tokens before the language model, then let fewer into every layer of a ramp, ranked by PageRank.

    budget: a fraction: the mean share of visual tokens over the layers.  Merging and pruning share the reduction as in
        the paper's setting, unless `merged` is given; the ramp keeps the paper's length, is moved to where it meets its
        part, and made steeper where that is not enough.
    merged: the share of each picture's or frame's tokens that merging leaves; 0.25 without a budget, 1.0 merges none.
    ramp: the paper's l1 and l2, in place of a budget: layer l works on the share 1 - (l - l1) / (l2 - l1) of the merged
        tokens, on all of them up to l1 and on none from l2 on.  If neither is given, (14, 22) of 28 layers, scaled.
    temperature, iterations: of the softmax that PageRank walks by, and how many steps it walks.
    PageRank is computed in the layers l1 .. l2 - 1 alone, where something goes (the released code: in all), of the
    tokens still there; in a later turn it walks among the tokens of that turn.  The paper multiplies the ranks by the
    matrix from the other side; we follow the code, in which a token scores that gets attention.  In the code, which
    masks, tokens that are gone vote on with the mass that they start with; here they are gone.  A merged token has
    the position of its seat; the released code numbers positions anew, which is positions="packed".
    """

    name: ClassVar[str] = "aim"
    stages: ClassVar[tuple[str, ...]] = ("prefill", "decoder")
    ranks_by_all: ClassVar[bool] = True
    amounts: ClassVar[tuple[str, ...]] = ("ramp",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llava-onevision-7b-video": {"merged": 0.25, "ramp": (14, 22)},
        "llava-1.5-7b": {"merged": 0.125, "ramp": (13, 21)},
    }

    budget: Budget | None = None
    merged: float | None = None
    ramp: tuple[int, int] | None = None
    temperature: float = 0.1
    iterations: int = 5
    positions: Literal["kept", "packed"] = "kept"

    def __post_init__(self) -> None:
        if self.budget is not None and not isinstance(self.budget, float):
            raise TypeError(f"aim's budget is a fraction in (0, 1]; got {self.budget!r}")
        super().__post_init__()
        if self.merged is not None and not (self.budget or 0) < self.merged <= 1:
            raise ValueError(
                "merged, the share of tokens that merging leaves, lies in (0, 1] and above the budget, which pruning "
                f"reaches from it; got {self.merged!r} and the budget {self.budget!r}"
            )
        if self.ramp is not None and not 0 <= self.ramp[0] < self.ramp[1]:
            raise ValueError(
                f"ramp is the last layer with all visual tokens and the first with none; got {self.ramp!r}"
            )
        if not self.temperature > 0 or self.iterations < 1:
            raise ValueError(
                f"temperature is above 0 and iterations are 1 or more; got {self.temperature!r} and {self.iterations!r}"
            )

    @property
    def merged_share(self) -> float:
        """The share of the tokens that merging leaves."""
        if self.merged is not None:
            return self.merged
        mean = self.mean_share(1)
        return 0.25 if mean is None else mean**MERGING_PART

    def with_budget(self, budget: Budget) -> Self:
        return replace(self, budget=budget, merged=None, ramp=None)

    def attach(self, target: Any, attachment: Attachment) -> None:
        merged = 1.0 if self.keeps_all else float(self.merged_share)
        if merged < 1 or any("vision" in method.stages for method in attachment.methods):  # tokens merged there, too
            AIMMerging(budget=merged, positions=self.positions).attach(target, attachment)
        super().attach(target, attachment)

    def cuts(self, layers: int) -> Sequence[int]:
        if self.keeps_all:
            return ()
        shares = self.shares(layers)
        cuts = [layer for layer in range(1, layers) if shares[layer] < shares[layer - 1]]
        if not cuts:
            raise Unsupported(
                f"aim's ramp {self.ramp} begins behind the last of this decoder's {layers} layers; it begins at "
                f"{layers - 2} at most"
            )
        return cuts

    def kept(self, layers: int, visual: int) -> Sequence[int]:
        shares = self.shares(layers)
        return [int(visual * shares[layer]) for layer in self.cuts(layers)]

    def shares(self, layers: int) -> list[float]:
        """The share of the merged tokens that each layer works on."""
        budget = self.mean_share(1)
        if budget is None:
            first, last = self.ramp or (round(layers * 14 / 28), round(layers * 22 / 28))
            return ramp_shares(layers, first, last - first)
        mean = budget / self.merged_share
        length = max(1, round(layers * 8 / 28))

        def at(start: float) -> list[float]:
            """Before layer 0 the ramp gets steeper instead of earlier: only what was scored can go."""
            return ramp_shares(layers, max(start, 0.0), length + min(start, 0.0))

        start = solved(lambda start: sum(at(start)) / layers, mean, 1.0 - length, layers - 1.0)
        found = at(start)
        if sum(found) / layers > mean + 1e-6:
            raise Unsupported(
                f"aim's first layer works on all visual tokens, so over {layers} layers the mean is at least "
                f"{1 / layers:.3g} of the merged tokens; {mean:.3g} of them, for a budget of {budget:.3g}, is out "
                "of reach: raise it, or merge more"
            )
        return found

    def score(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        return importance(partial(view.blocks, self.temperature), view.real, self.iterations, view.causal)


@dataclass(frozen=True, kw_only=True)
class AIMMerging(MergingMethod):
    """AIM's part before the language model: rounds of bipartite matching, each picture and frame on its own."""

    name: ClassVar[str] = "aim"
    projected: ClassVar[bool] = True

    budget: float
    positions: Literal["kept", "packed"] = "kept"

    def merge(self, view: ImageView, features: Float[Tensor, "partitions cells channels"]) -> Merged:
        have = view.layout.valid().sum(dim=-1)
        kept = (have * self.budget - 1e-9).ceil().long().clamp(min=1).minimum(have)
        return merge_cells(features, view.layout, kept)


def ramp_shares(layers: int, start: float, length: float) -> list[float]:
    """r_l = 1 - (l - l1) / (l2 - l1), between 0 and 1, for every layer l."""
    return [min(1.0, max(0.0, 1 - (layer - start) / length)) for layer in range(layers)]


def importance(
    blocks: Callable[[], Blocks], real: Bool[Tensor, "batch tokens"], iterations: int, causal: bool = True
) -> Float[Tensor, "batch tokens"]:
    """The root mean square, over heads, of every token's PageRank.

    blocks: called once if the matrix is causal, else once an iteration.  The walk starts evenly on the real tokens,
    has no damping, and carries mass from a query to the keys that it attends to.
    """
    mass: Tensor = (real / real.sum(dim=-1, keepdim=True)).float()[:, None]
    for steps in [iterations] if causal else [1] * iterations:
        mass = walk(blocks(), mass, steps)
    return mass.square().mean(dim=1).sqrt()


def walk(blocks: Blocks, mass: Float[Tensor, "batch _ tokens"], steps: int) -> Float[Tensor, "batch heads tokens"]:
    """mass M^steps, where M is shown once, in blocks of rows from the last to the first.

    More than one step needs M to be lower triangular: then all that flows into a row comes from rows of its own block
    or of later ones, so that each block can take all its steps when it is shown.
    """
    masses: list[Tensor] = []
    for start, matrix in blocks:
        if not masses:
            empty = matrix.new_zeros(*matrix.shape[:2], mass.shape[-1])
            masses = [mass.expand_as(empty), *(empty.clone() for _ in range(steps))]
        stop, columns = start + matrix.shape[2], matrix.shape[3]
        own, before = slice(start, stop), slice(0, start)
        if steps == 1:
            masses[1][..., :columns] += vector_times(masses[0][..., own], matrix)
            continue
        for step in range(steps):
            masses[step + 1][..., own] += vector_times(masses[step][..., own], matrix[..., own])
        outward = torch.stack([taken[..., own] for taken in masses[:-1]], dim=2) @ matrix[..., before]
        for step in range(steps):
            masses[step + 1][..., before] += outward[:, :, step]
    return masses[-1]


def vector_times(
    vector: Float[Tensor, "batch heads rows"], matrix: Float[Tensor, "batch heads rows columns"]
) -> Float[Tensor, "batch heads columns"]:
    """The product of row vectors and matrices."""
    return rearrange(vector[:, :, None] @ matrix, "batch heads 1 columns -> batch heads columns")
