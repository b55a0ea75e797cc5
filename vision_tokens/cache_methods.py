"""Methods that shrink the language model's key-value cache once a prompt was read.

A method scores tokens by each layer's attention (`score`), says which of them go (`plan`), and where room is made for
later ones (`slot`): pure functions.  `vision_tokens.cache_eviction` does the rest, once, for every family.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from jaxtyping import Bool, Float
from torch import Tensor

from vision_tokens.cache_eviction import Evictor
from vision_tokens.families import find_host
from vision_tokens.layer_view import LayerView
from vision_tokens.visual_method import VisualMethod

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from mmaccel.checks import LawResult


@dataclass(frozen=True)
class Eviction:
    """What a method makes of one row of a prompt.

    keep: which tokens stay.  counts: by layer, how many go.  shares: by layer, the share of later tokens that have to
        go for the cache to grow as the method wants it to.
    """

    keep: Bool[Tensor, "layers tokens"]
    counts: list[int]
    shares: list[float]


@dataclass(frozen=True, kw_only=True)
class CacheMethod(VisualMethod):
    """Base of the methods that evict tokens from the cache, when a prompt was read and while decoding.

    positions: "kept" gives new tokens the positions that they have in the sequence; "drifting" counts what the first
        layer still holds.
    """

    stages: ClassVar[tuple[str, ...]] = ("kv_cache",)
    positions: Literal["kept", "drifting"] = "kept"

    @property
    @abstractmethod
    def kept_share(self) -> float:
        """The share of the whole cache that stays; 1.0 is the dense model."""

    @abstractmethod
    def with_budget(self, budget: float) -> Self:
        """The same method with another share of the whole cache."""

    @property
    @abstractmethod
    def profile(self) -> Sequence[float] | None:
        """By layer, the share that stays, if it is known before a prompt is."""

    @abstractmethod
    def score(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        """How much each token of the prompt is worth to a layer."""

    @abstractmethod
    def plan(
        self, scores: Float[Tensor, "layers tokens"], lengths: Sequence[int], layers: Sequence[int], first: bool
    ) -> Eviction:
        """What goes of one row of a prompt.

        scores: of the layers numbered `layers`; of each the first `lengths` tokens count, and the others are zero.
        first: whether the prompt starts the sequence.
        """

    @abstractmethod
    def slot(self, kept: int) -> int:
        """The place, among the `kept` tokens behind a prompt, where room for later ones is made."""

    def attach(self, target: Any, attachment: Attachment) -> None:
        Evictor(self, find_host(target), attachment).attach(target)

    def laws(self, target: Any, inputs: Mapping[str, Any]) -> Iterable[LawResult]:
        from vision_tokens.cache_laws import cache_laws

        yield from cache_laws(target, self, inputs)
