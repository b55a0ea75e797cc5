"""Ways of our own to decode image tokens: how they stand in for that of a transformers model's `generate`."""

from __future__ import annotations

import functools
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from mmaccel.attachment import Attachment
from mmaccel.methods import Method, Unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.autoregressive.decoding import Decoding


class TokenMethod(Method):
    """Base class: a method that decodes the tokens of images in a loop of its own, behind the model's `generate`."""

    stages: ClassVar[tuple[str, ...]] = ("sample",)
    needs_processor: ClassVar[bool] = False
    knob: ClassVar[str | None] = None

    @abstractmethod
    def decoding(self, negative: Tensor | None, guidance: float) -> Decoding:
        """The loop of one call, which `generate` runs in place of its own."""

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


def _generate(method: TokenMethod, target: Any, attachment: Attachment, *args: Any, **kwargs: Any) -> Any:
    """The model's own `generate`, with our loop of decoding."""
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
    decoding = method.decoding(negative if guided else None, guidance if guided else 1.0)
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
    decoding.tell(report)
    return found
