"""Methods that act where the language model reads its visual tokens.

A method says which cells of an image stay (`SelectingMethod`) or how a tile's grid becomes a smaller one
(`ResamplingMethod`); `vision_tokens.cutting` does the rest, once, for every family.  Positions of kept tokens stay what
they were unless the method says `positions="packed"`.
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
from mmaccel.methods import Method, Unsupported
from vision_tokens.cutting import Cutter
from vision_tokens.families import find_host
from vision_tokens.layout import ImageView, Layout

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from mmaccel.checks import LawResult


@dataclass(frozen=True, kw_only=True)
class LanguageInputMethod(Method):
    """Base of the methods that act where the language model reads its visual tokens."""

    stages: ClassVar[tuple[str, ...]] = ("prefill",)
    attention: ClassVar[tuple[str, ...]] = ()  # encoder attention that `select` reads: "first", "feature"
    resamples: ClassVar[bool] = False  # whether features change, too

    budget: Budget
    positions: Literal["kept", "packed"] = "kept"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.positions not in ("kept", "packed"):
            raise ValueError(f"positions are 'kept' or 'packed'; got {self.positions!r}")

    @abstractmethod
    def select(self, view: ImageView) -> Bool[Tensor, "partitions cells"]:
        """The cells of one image that stay."""

    def seats(self, layout: Layout) -> Bool[Tensor, "partitions cells"]:
        """The cells on which a resampling method puts what `shrink` gives."""
        raise TypeError(f"{self.name} does not resample")

    def shrink(
        self, features: Float[Tensor, "tiles cells channels"], layout: Layout
    ) -> Float[Tensor, "tiles seats channels"]:
        """A resampling method's features of an image's tiles, fewer a tile."""
        raise TypeError(f"{self.name} does not resample")

    def attach(self, target: Any, attachment: Attachment) -> None:
        host = find_host(target)
        if host.family.grouped_positions and self.positions == "packed":
            raise Unsupported(f"{self.name}: positions of several axes (M-RoPE) cannot be packed; use positions='kept'")
        Cutter(self, host, attachment).attach(target)

    def laws(self, target: Any, inputs: Mapping[str, Any]) -> Iterable[LawResult]:
        from vision_tokens.laws import language_input_laws, oracle_law

        yield from language_input_laws(target, self, inputs)
        yield oracle_law(target, self, inputs)

    def example(self, target: Any, processor: Any) -> dict[str, Any]:
        from vision_tokens.laws import example_inputs

        return example_inputs(target, processor)


class SelectingMethod(LanguageInputMethod):
    """Keeps some cells of an image as they are."""


class ResamplingMethod(LanguageInputMethod):
    """Turns each tile's grid of cells into a smaller grid, which takes the seats of evenly spread cells."""

    resamples: ClassVar[bool] = True

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

    def seats(self, layout: Layout) -> Bool[Tensor, "partitions cells"]:
        keep = torch.zeros(layout.partitions, layout.cells, dtype=torch.bool)
        keep[:, evenly_spread(self.size_for(layout), (layout.height, layout.width))] = True
        return keep

    def shrink(
        self, features: Float[Tensor, "tiles cells channels"], layout: Layout
    ) -> Float[Tensor, "tiles seats channels"]:
        grid = rearrange(features, "tiles (height width) channels -> tiles height width channels", height=layout.height)
        return self.resample(grid, self.size_for(layout)).flatten(1, 2)

    def select(self, view: ImageView) -> Bool[Tensor, "partitions cells"]:
        valid = view.layout.valid()
        return self.seats(view.layout).to(valid.device) & valid


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
