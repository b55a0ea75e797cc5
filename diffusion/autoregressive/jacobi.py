"""Speculative Jacobi decoding of discrete image tokens: the target's own previous pass is the draft."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mmaccel.attachment import Attachment
from mmaccel.checks import LawResult
from mmaccel.methods import Method, Unsupported


@dataclass(frozen=True, kw_only=True)
class SpeculativeJacobi(Method):
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
    stages: ClassVar[tuple[str, ...]] = ("sample",)
    needs_processor: ClassVar[bool] = False
    knob: ClassVar[str | None] = None

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

    def attach(self, target: Any, attachment: Attachment) -> None:
        from transformers import GenerationMixin, PreTrainedModel

        if not (isinstance(target, PreTrainedModel) and isinstance(target, GenerationMixin) and target.can_generate()):
            mend = ". For autoregressive models of continuous tokens take ContinuousSpeculation" * hasattr(
                target, "head"
            )
            raise Unsupported(
                f"{self.name} speeds up transformers models that generate tokens; got {type(target).__name__}{mend}"
            )
        if target.config.is_encoder_decoder:
            raise Unsupported(f"{self.name} needs a decoder alone; {type(target).__name__} has an encoder, too")
        if target.config.model_type in REFUSED:
            raise Unsupported(f"{type(target).__name__}: {REFUSED[target.config.model_type]}")
        attachment.set_attribute(target, "generate", functools.partial(_generate, self, target, attachment))

    def laws(self, target: Any, inputs: Mapping[str, Any]) -> Iterable[LawResult]:
        """What makes the decoding right, on this model."""
        from diffusion.autoregressive.jacobi_laws import jacobi_laws

        return jacobi_laws(self, target, inputs)

    def example(self, target: Any, processor: Any) -> dict[str, Any]:
        """A few tokens after the word that starts an image."""
        import torch

        config = target.config
        start = config.bos_token_id if config.bos_token_id is not None else config.vocab_size - 1
        return {"inputs": torch.tensor([[start]]), "max_new_tokens": 24, "do_sample": True}


REFUSED = {
    "janus": "draws images in a loop of its own, which custom decoding does not reach",
    "chameleon": "forbids image tokens in its forward, so it draws no images",
}


def _generate(method: SpeculativeJacobi, target: Any, attachment: Attachment, *args: Any, **kwargs: Any) -> Any:
    """The model's own `generate`, with our loop of decoding."""
    from diffusion.autoregressive.jacobi_loop import Decoding

    if kwargs.get("custom_generate") is not None or kwargs.get("assistant_model") is not None:
        raise Unsupported(
            f"{method.name} is a way of decoding of its own; leave custom_generate and assistant_model away"
        )
    report = attachment.start_report()
    plain = functools.partial(type(target).generate, target)
    guidance = kwargs.pop("guidance_scale", None)
    negative = kwargs.pop("negative_prompt_ids", None)
    guided = guidance is not None and guidance != 1
    if guided and negative is None:
        raise Unsupported("guidance_scale needs negative_prompt_ids here: the prompt without its condition")
    decoding = Decoding(method, negative if guided else None, guidance if guided else 1.0)
    began = time.perf_counter()
    found = plain(*args, **kwargs, custom_generate=decoding)
    seconds = time.perf_counter() - began
    if guided:
        kwargs |= {"guidance_scale": guidance, "negative_prompt_ids": negative}

    @functools.cache
    def plain_seconds() -> float:
        began = time.perf_counter()
        plain(*args, **kwargs)
        return time.perf_counter() - began

    report.record("passes", decoding.passes, decoding.committed, "")
    report.record("tokens_a_pass", decoding.committed / decoding.passes)
    report.record("seconds", seconds, plain_seconds, "s")
    report.record("speed_up", lambda: plain_seconds() / seconds)
    report.facts["commits"] = dict(sorted(decoding.commits.items()))
    side = math.isqrt(decoding.origins.shape[1])
    if side**2 == decoding.origins.shape[1]:  # a square picture
        report.details["origins"] = decoding.origins.reshape(-1, side, side).cpu()
    return found
