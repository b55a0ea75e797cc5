"""Questions: `answer` asks one about a file, by whichever installed room knows that kind of file."""

from __future__ import annotations

import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmaccel.registry import entries


def answer(model: Any, processor: Any, file: str | Path, question: str, **settings: Any) -> Any:
    """What a model says to a question about a file, e.g. a video; its `text`, and more that the kind of file brings.

    processor: the model's.  settings: of the room's own function, found through the entry-point group `mmaccel.answers`
    by the kind of the file (`video.answering.answer` for videos).
    Raises FileNotFoundError, ValueError for a kind of file that no installed room answers questions about.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r} to ask about")
    kind = (mimetypes.guess_type(str(file))[0] or "unknown").partition("/")[0]
    known = entries("mmaccel.answers")
    if kind not in known:
        raise ValueError(
            f"{file} is of the kind {kind!r}, by its ending, and questions are answered about: "
            f"{', '.join(sorted(known)) or 'nothing that is installed'}"
        )
    return known[kind].load()(model, processor, file, question, **settings)


def chat_inputs(processor: Any, *contents: Sequence[dict[str, Any]]) -> Any:
    """A model's inputs for a message of a user each, by the processor's own chat template.

    contents: a message's parts, e.g. {"type": "image", "image": picture} and {"type": "text", "text": question}; of
    several messages, the shorter ones are padded on the left.
    """
    padding = {"padding": True, "padding_side": "left"} if len(contents) > 1 else {}
    return processor.apply_chat_template(
        [[{"role": "user", "content": list(content)}] for content in contents],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **padding,
    )
