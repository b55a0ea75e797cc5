"""What to look for: from a question to the things that answer it (targets) and the things seen near them (cues).

A grounding is any callable `grounding(question, film)` that returns `(targets, cues)`.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from mmaccel.answering import chat_inputs
from mmaccel.named import Named, NamedField
from video.colour_shape import COLOURS, SHAPES, read_phrase

if TYPE_CHECKING:
    from video.film import Film

Phrases = tuple[tuple[str, ...], tuple[str, ...]]  # targets, cues
LONGEST = 128  # tokens of a model's answer
PROMPT = """These are {count} frames of a video, in order of time. A question about the video: {question}
Which objects have to be found in the video to answer it, and which objects are seen near them? Answer in two lines:
key objects: names, with commas between
cue objects: names, with commas between"""


class Grounding(Named):
    """Base class of our groundings.  Subclasses are frozen dataclasses."""

    kind: ClassVar[str] = "grounding"
    called: ClassVar[str | None] = "grounding(question, film)"

    @abstractmethod
    def __call__(self, question: str, film: Film) -> Phrases:
        """The targets and the cues of a question; both may be empty."""


GroundingField = Annotated[Any, NamedField(Grounding)]
"""The type of a dataclass field that holds a grounding."""


@dataclass(frozen=True, kw_only=True)
class Words(Grounding):
    """The coloured shapes that the question names, such as "red triangle"; needs no model."""

    name: ClassVar[str] = "words"

    def __call__(self, question: str, film: Film) -> Phrases:
        names = (
            rf"(?:{'|'.join(COLOURS)})(?: (?:{'|'.join(SHAPES)})(?:es|s)?| things?)?|(?:{'|'.join(SHAPES)})(?:es|s)?"
        )
        said = re.findall(rf"\b(?:{names})\b", question.lower())
        read = [read_phrase(one) for one in said]
        return tuple(dict.fromkeys(f"{colour or ''} {shape or 'thing'}".strip() for colour, shape in read)), ()


@dataclass(frozen=True, kw_only=True)
class WholeQuestion(Grounding):
    """The question itself, as text-to-image similarity takes it."""

    name: ClassVar[str] = "question"

    def __call__(self, question: str, film: Film) -> Phrases:
        return ((question.strip(),) if question.strip() else ()), ()


@dataclass(frozen=True, kw_only=True)
class AskModel(Grounding):
    """What a vision-language model says after a look at a few evenly spaced frames (T*, section 4.1).

    model: a transformers checkpoint folder whose processor has a chat template and takes several pictures.  frames: how
    many it sees, short: their shorter side in pixels.  An answer in other than the two lines asked for names nothing.
    """

    name: ClassVar[str] = "ask-model"

    model: str
    frames: int = 8
    short: int | None = 224

    def __call__(self, question: str, film: Film) -> Phrases:
        from PIL import Image

        model, processor = _loaded(self.model)
        times = (np.arange(self.frames) + 0.5) / self.frames * film.reader.duration
        pictures = [Image.fromarray(picture) for picture in film.frames(times, self.short).pictures]
        text = PROMPT.format(count=len(pictures), question=question)
        content: list[dict[str, Any]] = [
            *({"type": "image", "image": picture} for picture in pictures),
            {"type": "text", "text": text},
        ]
        inputs = chat_inputs(processor, content)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST)[0, inputs["input_ids"].shape[1] :]
        return read_answer(processor.decode(tokens, skip_special_tokens=True))


@lru_cache(maxsize=1)
def _loaded(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mmaccel.checkpoints import find_folder, load_part, load_weights

    path = find_folder(folder)
    return load_weights(AutoModelForImageTextToText, path), load_part(AutoProcessor, path)


def read_answer(answer: str) -> Phrases:
    """Targets and cues from a model's two lines; nothing where there are not two.

    Lower case, without labels, numbers and punctuation other than hyphens.
    """
    lines = [line for line in answer.strip().splitlines() if line.strip()]
    return (_listed(lines[0]), _listed(lines[1])) if len(lines) == 2 else ((), ())


def _listed(line: str) -> tuple[str, ...]:
    told = re.sub(r"^\s*(?:\d+[.)]\s*)?(?:key|cue) objects?\s*:?", "", line.lower())
    names: Sequence[str] = [re.sub(r"[^\w\s-]", "", re.sub(r"^\s*\d+[.)]\s*", "", part)) for part in told.split(",")]
    return tuple(dict.fromkeys(" ".join(name.split()) for name in names if name.strip()))
