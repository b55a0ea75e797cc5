"""Answering a question about a video: its keyframes, then the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmaccel.answering import chat_inputs
from mmaccel.attachment import attached
from video.film import Film
from video.finding import Keyframes
from video.keyframes import KeyframeSearch
from video.processors import as_parts


@dataclass(frozen=True)
class Answer:
    """What a model said of a video, and the frames that it saw."""

    text: str
    keyframes: Keyframes


def answer(
    model: Any,
    processor: Any,
    film: Film | str | Path,
    question: str,
    method: KeyframeSearch | None = None,
    *,
    longest: int = 64,
    alone: bool = False,
) -> Answer:
    """Asks a vision-language model about the keyframes of a video.

    processor: the model's, with a chat template.  film: a file, or an open `Film`, which many questions may share.
    method: how frames are chosen; None takes the one that is applied to the processor, or else the default one.
    Methods applied to the model work as ever.  longest: most tokens of an answer.  alone: asks about every frame alone
    and takes the answer that the model is surest of, for models that were trained on single pictures.
    """
    method = method or _applied(processor) or KeyframeSearch()
    with _opened(film, method) as opened:
        found, _, _ = method.find(opened, question)
    asked = {"type": "text", "text": question}
    if not alone:
        return Answer(_ask(model, processor, [*as_parts(found, method.stamp), asked], longest)[1], found)
    answers = [_ask(model, processor, [part, asked], longest) for part in as_parts(found, stamp="")]
    return Answer(max(answers, key=lambda said: said[0])[1], found)


def _applied(processor: Any) -> KeyframeSearch | None:
    attachment = attached(processor)
    methods = attachment.methods if attachment else ()
    return next((method for method in methods if isinstance(method, KeyframeSearch)), None)


@contextmanager
def _opened(film: Film | str | Path, method: KeyframeSearch) -> Iterator[Film]:
    if isinstance(film, Film):
        yield film
        return
    with Film(film, method.looks) as opened:
        yield opened


def _ask(model: Any, processor: Any, content: list[dict[str, Any]], longest: int) -> tuple[float, str]:
    """The logarithm of the probability of the model's most likely answer, token by token, and the answer."""
    import torch

    inputs = chat_inputs(processor, content).to(model.device)
    with torch.no_grad():
        made = model.generate(
            **inputs, do_sample=False, max_new_tokens=longest, return_dict_in_generate=True, output_logits=True
        )
    tokens = made.sequences[0, inputs["input_ids"].shape[1] :]
    steps = torch.stack(made.logits)[:, 0].float().log_softmax(-1)
    sure = float(steps.gather(-1, tokens[:, None]).sum())
    return sure, processor.decode(tokens, skip_special_tokens=True).strip()
