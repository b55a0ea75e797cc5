"""The output gate: while an answer is written, decide for every token whether later ones get to see it.

Source: Huang et al., "Dynamic-LLaVA: Efficient Multimodal Large Language Models via Dynamic Vision-language Context
Sparsification", ICLR 2025 (arXiv:2412.00876), section 3.2, the output-text predictor with a cache.  The rule without a
predictor is ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vision_tokens.families import find_host
from vision_tokens.visual_method import VisualMethod

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from mmaccel.checks import LawResult
    from vision_tokens.predictors import OutputPredictor


@dataclass(frozen=True, kw_only=True)
class OutputGate(VisualMethod):
    """Let only some of an answer's tokens into the key-value cache: those that a predictor, or their novelty, lets in.

    weights: a safetensors file with the parameters output_text_score_predictor.* of Dynamic-LLaVA's release, or
        "pocket-llava" for those that ship, trained for that model alone: a token is let in if its logit for keeping is
        the higher one.  None: the training-free form, in which a token is let in if its hidden state differs more from
        the sum of those let in before than most of the answer's did.
    layer: the first layer that forgets tokens, whose input is judged; from 0 up.
    budget: of the training-free form, the share of an answer's tokens that is let in, in the long run; 0.5 by default,
        1.0 is the dense model.
    Every token sees itself, and the layers before `layer` keep all.  Prompts, a later turn's included, are kept whole;
    so are layers with a window, which bounds them.  The released code pads rows of a batch with keys that it does not
    mask; ours hold their own tokens.  Without a cache it scores all tokens at every step; we need one.
    """

    name: ClassVar[str] = "output-gate"
    stages: ClassVar[tuple[str, ...]] = ("kv_cache",)
    knob: ClassVar[str | None] = None
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"pocket-llava": {"weights": "pocket-llava", "layer": 2}}

    weights: str | None = None
    layer: int = 2
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and self.budget is not None:
            raise ValueError(
                "give output-gate weights, whose predictor decides by itself, or a budget, for the training-free form; "
                f"got both, {self.weights!r} and {self.budget!r}"
            )
        if self.budget is not None and (not isinstance(self.budget, float) or not 0 < self.budget <= 1):
            raise ValueError(
                f"the share of an answer's tokens that is cached lies in (0, 1]; got {self.budget!r}. For all say 1.0"
            )
        if self.layer < 0:
            raise ValueError(f"output-gate's layer is a number from 0 up; got {self.layer!r}")

    @property
    def positions(self) -> str:
        """Every token keeps its position."""
        return "kept"

    def with_budget(self, budget: float) -> Self:
        """The training-free form with another share."""
        return dataclasses.replace(self, weights=None, budget=budget)

    def predictor(self, states: int) -> OutputPredictor | None:
        """The trained network, for hidden states `states` wide; None in the training-free form."""
        from vision_tokens.predictors import OutputPredictor

        return None if self.weights is None else OutputPredictor.load(self.weights, states)

    def admits(self, worth: Float[Tensor, " batch"], earlier: Float[Tensor, "batch said"]) -> Bool[Tensor, " batch"]:
        """Whether tokens are let in.  earlier: what the answer's tokens before were worth."""
        if self.weights is not None:
            return worth > 0
        share = 0.5 if self.budget is None else self.budget
        return (earlier >= worth[:, None]).sum(dim=-1) < share * (earlier.shape[1] + 1)

    def attach(self, target: Any, attachment: Attachment) -> None:
        from vision_tokens.gating import Gatekeeper

        Gatekeeper(self, find_host(target), attachment).attach(target)

    def laws(self, target: Any, inputs: Mapping[str, Any]) -> Iterable[LawResult]:
        from vision_tokens.cache_laws import cache_laws

        yield from cache_laws(target, self, inputs)


def novelty(states: Float[Tensor, "batch width"], known: Float[Tensor, "batch width"]) -> Float[Tensor, " batch"]:
    """1 less the cosine between hidden states and the sum of those that were let in; 1 where none was."""
    return 1 - torch.cosine_similarity(states.float(), known, dim=-1)
