"""Speculative Jacobi decoding of discrete image tokens: the target's own previous pass is the draft."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffusion.autoregressive.token_methods import TokenMethod
from mmaccel.checks import LawResult

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.autoregressive.jacobi_loop import JacobiDecoding


@dataclass(frozen=True, kw_only=True)
class SpeculativeJacobi(TokenMethod):
    """Decode a window of an image's tokens in every pass, with the previous pass's draws as drafts.

    window: how many tokens a pass reads, the last committed one and drafts; 1 is plain decoding.
    redraw: how the drafts behind the committed ones are drawn again.  "independent" is the paper's; "coupled" keeps
    each where it can (maximal coupling), so that drafts settle; both draw exactly the model's distribution.  "gumbel"
    gives each position one fixed noise, so that the tokens *equal* plain decoding with that noise (`window=1`).
    initial: the first drafts: "uniform" words, or "repeat-left", the word before them, or "sample-left", the likeliest
    word there; the latter two keep uniform words where a line of `row_length` tokens starts.
    group: **lossy** above 1: a draft is kept as often as a group of so many words of about its probability would be,
    whatever its own share (GSD, arXiv:2508.07747); fewer passes, and another distribution than the model's.
    slack: **lossy** above 0: a draft is kept as if it had the probability of its neighbours, too, so much at most: of
    the words with the nearest input embeddings (LANTERN, arXiv:2410.03355, which compares a codebook's vectors).
    first_word, last_word: the range of the words that images are made of; None is all that the model predicts.

    For models whose `generate` decodes an image (ImageGPT, and any causal language model of image tokens).  Guidance:
    pass `guidance_scale` and `negative_prompt_ids` of the prompt's length; both branches go through the model at once.
    Where we differ from the release: rows of a batch may get ahead of each other, and are exact (there, tokens are
    tested twice); processors act on p alone, not again on what is left of it; uniform drafts carry their own law.
    Sources: arXiv:2410.01699, and arXiv:2510.24211 for the coupled redraws.
    """

    name: ClassVar[str] = "speculative-jacobi"

    window: int = 16
    redraw: Literal["independent", "coupled", "gumbel"] = "coupled"
    initial: Literal["uniform", "repeat-left", "sample-left"] = "uniform"
    group: int = 1
    slack: float = 0.0
    row_length: int | None = None
    first_word: int | None = None
    last_word: int | None = None

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is a number of tokens from 1 up; got {self.window!r}. 1 is plain decoding")
        if self.group < 1:
            raise ValueError(f"group is a number of words from 1 up; got {self.group!r}. 1 is lossless")
        if not 0 <= self.slack <= 1:
            raise ValueError(f"slack is a probability; got {self.slack!r}. 0 is lossless")
        if self.group > 1 and self.slack:
            raise ValueError(f"group and slack are two ways to be lossy; take one: got {self.group} and {self.slack}")
        if self.redraw == "gumbel" and (self.group > 1 or self.slack):
            raise ValueError(
                f"redraw='gumbel' equals plain decoding, and group={self.group}, slack={self.slack} keep what it would "
                "not draw; take another redraw, or group=1 and slack=0"
            )
        if self.row_length is not None and self.row_length < 1:
            raise ValueError(f"row_length is a number of tokens from 1 up; got {self.row_length!r}")

    def decoding(self, negative: Tensor | None, guidance: float) -> JacobiDecoding:
        from diffusion.autoregressive.jacobi_loop import JacobiDecoding

        return JacobiDecoding(self, negative, guidance)

    def laws(self, target: Any, inputs: Mapping[str, Any]) -> Iterable[LawResult]:
        """What makes the decoding right, on this model."""
        from diffusion.autoregressive.jacobi_laws import jacobi_laws

        return jacobi_laws(self, target, inputs)
