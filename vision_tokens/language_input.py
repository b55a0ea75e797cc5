"""Methods that act where the language model reads its visual tokens.

A method says which cells of an image stay (`SelectingMethod`), which stay with what features on them (`MergingMethod`)
or how a tile's grid becomes a smaller one (`ResamplingMethod`); `vision_tokens.cutting` does the rest, once, for every
family.  Positions of kept tokens stay what they were, a merged one's that of its seat, unless the method says
`positions="packed"`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmaccel.budgets import Budget, Tokens, check_budget, kept_count
from mmaccel.methods import Unsupported
from vision_tokens.families import find_host
from vision_tokens.layout import ImageView, Layout, Merged
from vision_tokens.masks import window_of
from vision_tokens.visual_method import VisualMethod

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from mmaccel.checks import LawResult
    from vision_tokens.query_compressor import QueryCompressor


@dataclass(frozen=True, kw_only=True)
class LanguageInputMethod(VisualMethod):
    """Base of the methods that act where the language model reads its visual tokens."""

    stages: ClassVar[tuple[str, ...]] = ("prefill",)
    attention: ClassVar[tuple[str, ...]] = ()  # encoder layers whose attention it reads: "first", "feature", "last"
    keys: ClassVar[tuple[str, ...]] = ()  # likewise, whose keys
    joined_heads: ClassVar[bool] = False  # whether both are read with all heads joined to one
    adaptive: ClassVar[bool] = False  # whether the budget may be "adaptive": found image by image

    budget: Budget | Literal["adaptive"]
    positions: Literal["kept", "packed"] = "kept"

    def __post_init__(self) -> None:
        if not (self.adaptive and self.budget == "adaptive"):
            check_budget(self.budget)
        if self.positions not in ("kept", "packed"):
            raise ValueError(f"positions are 'kept' or 'packed'; got {self.positions!r}")

    def attach(self, target: Any, attachment: Attachment) -> None:
        from vision_tokens.cutting import Cutter

        host = find_host(target)
        if host.family.grouped_positions and self.positions == "packed":
            raise Unsupported(f"{self.name}: positions of several axes (M-RoPE) cannot be packed; use positions='kept'")
        if self.positions == "packed" and window_of(host.text.config) is not None:
            raise Unsupported(
                f"{self.name}: layers with a window look back a number of original places, so positions cannot be "
                "packed; use positions='kept'"
            )
        Cutter(self, host, attachment).attach(target)

    def laws(self, target: Any, inputs: Mapping[str, Any]) -> Iterable[LawResult]:
        from vision_tokens.laws import language_input_laws, oracle_law

        yield from language_input_laws(target, self, inputs)
        yield oracle_law(target, self, inputs)


class SelectingMethod(LanguageInputMethod):
    """Keeps some cells of an image as they are."""

    @abstractmethod
    def select(self, view: ImageView) -> Bool[Tensor, "partitions cells"]:
        """The cells of one image that stay."""


class MergingMethod(LanguageInputMethod):
    """Keeps some cells of an image, its seats, and puts merged features on them."""

    projected: ClassVar[bool] = False  # whether it merges what the projector gives, not what it gets

    @abstractmethod
    def merge(self, view: ImageView, features: Float[Tensor, "partitions cells channels"]) -> Merged:
        """The seats of one image and the features on them.

        features: before the projector where a family's works token by token, and behind it elsewhere; always behind it
        if the method is `projected`.
        """


@dataclass(frozen=True)
class Condensing:
    """What makes fewer tokens of a picture, and what it is made for.

    network: takes the features, the encoder's hidden states side by side and the question's.  levels: which hidden
    states.  template: how many tokens stand between a picture and its question, and behind the question.
    """

    network: QueryCompressor
    levels: tuple[int, ...]
    template: tuple[int, int]

    @property
    def kernel(self) -> int:
        """How many cells a token stands for, across and down."""
        return self.network.kernel


class QuestionMethod(LanguageInputMethod):
    """Makes new features for evenly spread cells of a picture, in view of what the prompt asks about it."""

    @abstractmethod
    def condensing(self, side: int, width: int, text: int) -> Condensing:
        """What makes tokens of pictures of side x side cells.  Raises `Unsupported` if it is for another model.

        width: of the encoder's features; text: of the language model's hidden states.
        """


class ResamplingMethod(MergingMethod):
    """Turns each tile's grid of cells into a smaller grid, which takes the seats of evenly spread cells."""

    budget: Budget

    @abstractmethod
    def resample(
        self, features: Float[Tensor, "tiles height width channels"], size: tuple[int, int]
    ) -> Float[Tensor, "tiles small_height small_width channels"]:
        """The features of each tile on a grid of the given size."""

    def size_for(self, layout: Layout) -> tuple[int, int]:
        """The grid that a tile of this layout gets; a budget counted in tokens is shared by the tiles equally."""
        budget = self.budget
        if not isinstance(budget, float):
            budget = Tokens(max(1, kept_count(budget, layout.partitions * layout.cells) // layout.partitions))
        return grid_within(kept_count(budget, layout.cells), (layout.height, layout.width))

    def merge(self, view: ImageView, features: Float[Tensor, "partitions cells channels"]) -> Merged:
        grid = (view.layout.height, view.layout.width)
        size = self.size_for(view.layout)
        seats = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
        seats[:, evenly_spread(size, grid)] = True
        tiles = rearrange(features, "tiles (height width) channels -> tiles height width channels", height=grid[0])
        return Merged(seats, self.resample(tiles, size).flatten(0, 2))


def grid_within(count: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The largest grid of at most `count` cells whose shape is nearest to `grid`; never larger than `grid`.

    The two heights around the one that keeps the shape exactly are tried; the larger area wins, then the nearer shape.
    """
    height, width = grid
    ideal = math.isqrt(count * height // width)
    sizes = []
    for rows in (ideal, ideal + 1):
        rows = min(max(rows, 1), height, count)
        sizes.append((rows, min(width, count // rows)))
    return max(sizes, key=lambda size: (size[0] * size[1], -abs(math.log(size[0] * width / (size[1] * height)))))


def evenly_spread(size: tuple[int, int], grid: tuple[int, int]) -> Int[Tensor, " cells"]:
    """The cells of `grid`, in raster order, that a smaller grid spread evenly over it falls on."""
    rows = ((torch.arange(size[0]) + 0.5) * grid[0] / size[0]).long()
    columns = ((torch.arange(size[1]) + 0.5) * grid[1] / size[1]).long()
    return (rows[:, None] * grid[1] + columns).flatten()
