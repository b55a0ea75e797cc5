"""What our loops of decoding share: the calls they refuse, and the laws of words after guidance and processors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion.autoregressive.token_methods import TokenMethod
from diffusion.autoregressive.verification import one_hot
from mmaccel.methods import Unsupported
from mmaccel.reports import Report

REFUSED_PROCESSORS = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "runs the model again by itself; pass guidance_scale and "
    "negative_prompt_ids to generate",
}

BLIND = (
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinPLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
)
"""Processors of transformers that look at no token read so far: one call does for many places."""


class Decoding(ABC):
    """One call of `generate`: handed to it as `custom_generate`.

    negative: the prompts without their condition, for guidance, or None.  passes: calls of the model so far.
    committed: the tokens of each row that they gave.
    """

    def __init__(self, method: TokenMethod, negative: Tensor | None, guidance: float) -> None:
        self.method, self.negative, self.guidance = method, negative, guidance
        self.passes = self.committed = 0

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Tensor:
        """All tokens of all rows, [rows, prompt + new]."""
        self.check(input_ids, logits_processor, stopping_criteria, generation_config, kwargs)
        self.model, self.processors, self.samples = model, logits_processor, generation_config.do_sample
        self.cache = kwargs["past_key_values"]
        mask = kwargs.get("attention_mask")
        self.mask = torch.ones_like(input_ids) if mask is None else mask
        if self.negative is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.negative)])
        return self.decode(input_ids, generation_config.max_length, stopping_criteria)

    @abstractmethod
    def decode(self, input_ids: Int[Tensor, "rows prompt"], end: int, stopping: Any) -> Int[Tensor, "rows all"]:
        """The loop: all tokens of all rows, up to `end` of each."""

    @abstractmethod
    def tell(self, report: Report) -> None:
        """Writes what this decoding alone has to report of its call."""

    def logits(self, words: Int[Tensor, "branches read"], asked: int, mask: Tensor | None, **more: Any) -> Tensor:
        """The model's logits behind the last `asked` of these words, of which the cache keeps keys and values."""
        self.passes += 1
        output = self.model(input_ids=words, attention_mask=mask, past_key_values=self.cache, use_cache=True, **more)
        logits: Tensor = output.logits[:, -asked:].float()
        return logits

    def laws(
        self, logits: Float[Tensor, "branches places words"], read: Int[Tensor, "rows all"], ends: Sequence[int]
    ) -> Float[Tensor, "rows places words"]:
        """The laws that words are drawn from.  read[:, : ends[i]] is what place i follows, for the processors."""
        if self.negative is not None:
            told, untold = logits.log_softmax(dim=-1).chunk(2)
            logits = untold + self.guidance * (told - untold)
        scores = self._processed(logits, read, ends)
        if not bool(torch.isfinite(scores.amax(dim=-1)).all()):
            raise ValueError("the model gives logits that are no numbers, or its processors forbid every word")
        return scores.softmax(dim=-1) if self.samples else one_hot(scores.argmax(dim=-1), scores.shape[-1])

    def _processed(self, logits: Tensor, read: Tensor, ends: Sequence[int]) -> Tensor:
        rows, places, _ = logits.shape
        if all(type(processor).__name__ in BLIND for processor in self.processors):
            together: Tensor = self.processors(read.repeat_interleave(places, dim=0), logits.flatten(0, 1))
            return together.reshape(rows, places, -1)
        return torch.stack([self.processors(read[:, :end], logits[:, i]) for i, end in enumerate(ends)], dim=1)

    def check(self, input_ids: Tensor, processors: Any, stopping: Any, config: Any, kwargs: dict[str, Any]) -> None:
        """Raises Unsupported for calls that this loop would decode otherwise than they ask."""
        name = self.method.name
        if config.num_beams > 1:
            raise Unsupported(f"{name} draws samples; got num_beams={config.num_beams}. Pass num_beams=1")
        if config.return_dict_in_generate:
            raise Unsupported(f"{name} returns tokens alone; pass return_dict_in_generate=False")
        if kwargs.get("streamer") is not None:
            raise Unsupported(f"{name} commits several tokens at once, which no streamer is told of; leave it away")
        cache = kwargs.get("past_key_values")
        if getattr(cache, "is_compileable", False) or not hasattr(cache, "crop"):
            raise Unsupported(
                f"{name} takes tokens back out of the cache; got {type(cache).__name__}. Use a dynamic cache"
            )
        if any(getattr(cache, "is_sliding", [])):
            raise Unsupported(f"{name} needs layers that see the whole past; this model's have sliding windows")
        for processor in processors:
            if mend := REFUSED_PROCESSORS.get(type(processor).__name__):
                raise Unsupported(f"{type(processor).__name__} {mend}")
        if self.negative is not None and self.negative.shape != input_ids.shape:
            raise Unsupported(
                f"negative_prompt_ids have the prompt's shape here, {list(input_ids.shape)}; got "
                f"{list(self.negative.shape)}"
            )
