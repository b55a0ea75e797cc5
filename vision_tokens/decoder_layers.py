"""Methods that drop visual tokens between the language model's layers.

A method says before which layers tokens go and how many stay (`cuts`, `kept`), and scores tokens by one layer's
attention (`score`): pure functions.  `vision_tokens.layer_cutting` does the rest, once, for every family.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmaccel.budgets import Budget, check_budget, keeps_all, kept_count
from mmaccel.methods import Unsupported
from vision_tokens.families import find_host
from vision_tokens.layer_cutting import LayerCutter
from vision_tokens.layer_view import LayerView
from vision_tokens.visual_method import VisualMethod

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from mmaccel.checks import LawResult
    from vision_tokens.predictors import ImagePredictor


@dataclass(frozen=True, kw_only=True)
class DecoderMethod(VisualMethod):
    """Base of the methods that drop visual tokens between decoder layers.

    budget: the mean, over the decoder's layers, of a prompt's visual tokens that a layer works on: their share, or
        their number.  None leaves it to the paper's own parameters.
    positions: "kept" leaves every token its position; "packed" numbers the tokens of each layer anew.
    """

    stages: ClassVar[tuple[str, ...]] = ("decoder",)
    scored_in: ClassVar[Literal["the layer before", "the layer itself"]] = "the layer before"
    """Whose attention ranks the tokens that go before a layer: what the layer before it saw, or, computed ahead of
    time from its input, its own."""
    amounts: ClassVar[tuple[str, ...]] = ()  # the paper's parameters that a budget stands in for; None if not given

    budget: Budget | None = None
    positions: Literal["kept", "packed"] = "kept"

    def __post_init__(self) -> None:
        if self.budget is not None:
            check_budget(self.budget)
            for name in self.amounts:
                if (given := getattr(self, name)) is not None:
                    raise ValueError(
                        f"give {self.name} a budget, the mean over layers, or {name}, what the paper sets; got both, "
                        f"{self.budget!r} and {given!r}"
                    )
        if self.positions not in ("kept", "packed"):
            raise ValueError(f"positions are 'kept' or 'packed'; got {self.positions!r}")

    @abstractmethod
    def cuts(self, layers: int) -> Sequence[int]:
        """The layers before which tokens go, ascending, in a decoder of so many layers; none at budget 1.0.

        Raises `Unsupported` if the decoder is too shallow, or the budget out of reach.
        """

    @abstractmethod
    def kept(self, layers: int, visual: int) -> Sequence[int]:
        """How many of a prompt's visual tokens stay at each of the cuts."""

    @abstractmethod
    def score(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        """How much each token is worth; read at visual tokens alone."""

    def predictor(self, states: int) -> ImagePredictor | None:
        """A trained network that scores tokens by their hidden states, `states` wide, in place of `score`."""
        return None

    def mark(
        self,
        embeddings: Float[Tensor, "batch tokens width"],
        visual: Bool[Tensor, "batch tokens"],
        real: Bool[Tensor, "batch tokens"],
    ) -> Bool[Tensor, "batch tokens"] | None:
        """Tokens that `score` wants to know again in every layer (`view.marked`), chosen from what the model reads."""
        return None

    def choose(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        scores: Float[Tensor, "batch tokens"],
        visual: Bool[Tensor, "batch tokens"],
        counts: Sequence[int],
    ) -> tuple[Float[Tensor, "batch tokens width"], Bool[Tensor, "batch tokens"]]:
        """The tokens that stay, and hidden states for them; `counts` visual ones of each row."""
        return hidden, keep_highest(scores, visual, counts) | ~visual

    def with_budget(self, budget: Budget) -> Self:
        """The same method at another budget, which stands in for what the paper sets."""
        unset: dict[str, Any] = dict.fromkeys(self.amounts)
        return dataclasses.replace(self, budget=budget, **unset)

    @property
    def merges(self) -> bool:
        """Whether `choose` changes hidden states."""
        return False

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is dropped: the dense model."""
        return self.budget is not None and keeps_all(self.budget)

    def mean_share(self, visual: int) -> float | None:
        """The budget as a share of so many tokens; None if the paper's parameters decide."""
        if self.budget is None or isinstance(self.budget, float):
            return self.budget
        return kept_count(self.budget, visual) / visual

    def knob_range_on(self, target: Any) -> tuple[float, float]:
        """From the smallest budget that the layers before the first cut leave within reach."""
        layers = len(find_host(target).decoder_layers)

        def reached(budget: float) -> float:
            try:
                self.with_budget(budget).cuts(layers)
            except Unsupported:
                return 0.0
            return 1.0

        least = solved(reached, 1.0, *self.knob_range)
        return least if reached(least) else least + 1e-9, self.knob_range[1]  # nine digits may fall short of it

    def attach(self, target: Any, attachment: Attachment) -> None:
        LayerCutter(self, find_host(target), attachment).attach(target)

    def laws(self, target: Any, inputs: Mapping[str, Any]) -> Iterable[LawResult]:
        from vision_tokens.decoder_laws import decoder_laws
        from vision_tokens.laws import oracle_law

        yield from decoder_laws(target, self, inputs)
        cuts = len(self.cuts(len(find_host(target).decoder_layers)))
        yield oracle_law(target, self, inputs, cuts=cuts, aside=("ranking",) if self.ranks_by_all else ())


@dataclass(frozen=True, kw_only=True)
class OneCutMethod(DecoderMethod):
    """Base of the methods that drop visual tokens once.

    layer: the first layer that works on fewer tokens, from 1 up.
    kept_share: the share kept at the cut, in place of a budget; 0.5 if neither is given.
    """

    amounts: ClassVar[tuple[str, ...]] = ("kept_share",)

    layer: int
    kept_share: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kept_share is not None and not 0 <= self.kept_share <= 1:
            raise ValueError(
                f"{self.name}'s kept_share, the share of visual tokens kept at the cut, lies in [0, 1]; got "
                f"{self.kept_share!r}"
            )

    def cuts(self, layers: int) -> Sequence[int]:
        return checked_cuts(self, (self.layer,), layers)

    def kept(self, layers: int, visual: int) -> Sequence[int]:
        mean = self.mean_share(visual)
        if mean is None:
            share = 0.5 if self.kept_share is None else self.kept_share
        else:
            share = share_behind(self, mean, self.layer, layers)
        return (round(visual * share),)


def keep_highest(
    scores: Float[Tensor, "batch tokens"], visual: Bool[Tensor, "batch tokens"], counts: Sequence[int]
) -> Bool[Tensor, "batch tokens"]:
    """Marks as many of each row's visual tokens as `counts` says, those that score highest; of equals the earlier."""
    rank = scores.masked_fill(~visual, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < torch.tensor(counts, device=scores.device)[:, None]) & visual


def checked_cuts(method: DecoderMethod, cuts: Sequence[int], layers: int) -> Sequence[int]:
    """The cuts; none if the method keeps all.

    Raises `Unsupported` unless every cut has a layer before it and a layer behind it, and the budget is within reach.
    """
    if method.keeps_all:
        return ()
    if not cuts or min(cuts) < 1 or max(cuts) >= layers or list(cuts) != sorted(set(cuts)):
        raise Unsupported(
            f"{method.name} drops tokens before the layers {list(cuts)}, and this decoder has {layers}: they lie, "
            f"ascending, in 1..{layers - 1}"
        )
    if isinstance(method.budget, float):
        share_behind(method, method.budget, cuts[0], layers)
    return cuts


def solved(mean_at: Callable[[float], float], mean: float, low: float, high: float) -> float:
    """Where between `low` and `high` a function that does not fall reaches `mean`: by bisection, to nine digits."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_at(middle) < mean else (low, middle)
    return round(high, 9)


def share_behind(method: DecoderMethod, mean: float, whole: int, layers: int) -> float:
    """The share of the tokens for the other layers, when `whole` of them work on all and the mean is given.

    Raises `Unsupported` if those that work on all spend the budget alone.
    """
    share = (mean * layers - whole) / (layers - whole)
    if share < -1e-9:
        raise Unsupported(
            f"{method.name} leaves the first {whole} of {layers} layers all visual tokens, so the mean over layers is "
            f"at least {whole / layers:.3g}; a budget of {mean:.3g} is out of reach: raise it, or cut earlier"
        )
    return max(0.0, round(share, 12))
