"""Attaching a keyframe search to a processor of transformers: where a call or a chat names a video, frames stand in.

A processor is no module: its class is swapped for a subclass whose call reads videos, and its `apply_chat_template`,
which reads them earlier, is an attribute of the instance.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmaccel.attachment import Attachment, undecorated
from mmaccel.methods import Unsupported
from mmaccel.reports import Report
from video.film import Film
from video.finding import Keyframes

if TYPE_CHECKING:
    from video.keyframes import KeyframeSearch

SOURCES = ("video", "path", "url")  # where a chat's video part names its file
WRAPPED = {"<|image_pad|>": "<|vision_start|><|image_pad|><|vision_end|>"}
"""How a picture is written in a prompt, for processors whose image token does not stand alone (Qwen-VL)."""


def decorate(method: KeyframeSearch, processor: Any, attachment: Attachment) -> None:
    """Makes the processor read videos through the search.  Raises Unsupported for what is no image-text processor."""
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise Unsupported(
            f"{method.name} decorates a processor with an image processor and a tokenizer (a model never sees the "
            f"file); got {type(processor).__name__}. Apply it to AutoProcessor.from_pretrained(folder)"
        )
    plain = type(processor)
    reader = VideoReading(method, processor, attachment)

    @functools.wraps(plain.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is processor:
            return reader.call(functools.partial(plain.__call__, self), args, kwargs)
        return plain.__call__(self, *args, **kwargs)

    names = {"__call__": call, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    attachment.swap_class(processor, type(plain.__name__, (plain,), names))
    if hasattr(plain, "apply_chat_template"):
        attachment.set_attribute(processor, "apply_chat_template", reader.chat(processor.apply_chat_template))

    def to_dict(*args: Any, **kwargs: Any) -> Any:
        with undecorated(processor):
            return processor.to_dict(*args, **kwargs)

    attachment.set_attribute(processor, "to_dict", to_dict)  # what save_pretrained writes


class VideoReading:
    """What a decorated processor does with videos.  The film asked about last stays open, with what was seen of it."""

    def __init__(self, method: KeyframeSearch, processor: Any, attachment: Attachment) -> None:
        self.method, self.processor, self.attachment = method, processor, attachment
        self.lock = threading.Lock()
        self.film: tuple[tuple[Any, ...], Film] | None = None

    def call(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The processor's call: `videos` may be a file or a list of files, one a text."""
        arguments = dict(inspect.signature(plain).bind(*args, **kwargs).arguments)
        arguments |= arguments.pop("kwargs", {})
        videos = arguments.get("videos")
        files = [videos] if _is_file(videos) else videos
        if not isinstance(files, list | tuple) or not files or not all(map(_is_file, files)):
            return plain(**arguments)
        if arguments.get("images") is not None:
            raise Unsupported("pictures beside a video are not supported in one call; write them into a chat instead")
        texts = arguments.get("text")
        rows = [texts] if isinstance(texts, str) else list(texts or [])
        if len(rows) != len(files):
            raise ValueError(f"every text has one video; got {len(rows)} texts and {len(files)} videos")
        report = self.attachment.start_report()
        read = [self._row(text, file, report) for text, file in zip(rows, files, strict=True)]
        del arguments["videos"]
        arguments["text"] = read[0][0] if isinstance(texts, str) else [text for text, _ in read]
        arguments["images"] = read[0][1] if isinstance(texts, str) else [pictures for _, pictures in read]
        return plain(**arguments)

    def _row(self, text: str, file: Any, report: Report) -> tuple[str, list[Any]]:
        marker = marker_of(self.processor, text)
        if text.count(marker) != 1:
            raise ValueError(f"a text says once, as {marker}, where its video belongs; got {text!r}")
        token = str(self.processor.image_token)
        parts = self._frames(file, text.replace(marker, " "), report)
        written = "".join(WRAPPED.get(token, token) if part["type"] == "image" else part["text"] for part in parts)
        return text.replace(marker, written), [part["image"] for part in parts if part["type"] == "image"]

    def chat(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """The processor's `apply_chat_template`: a part {"type": "video", "path": file} becomes frames."""

        @functools.wraps(plain)
        def apply_chat_template(conversation: Any, *args: Any, **kwargs: Any) -> Any:
            if not any(map(_video_of, _parts(conversation))):
                return plain(conversation, *args, **kwargs)
            report = self.attachment.start_report()
            many = isinstance(conversation[0], list | tuple)
            chats = [self._chat(chat, report) for chat in (conversation if many else [conversation])]
            return plain(chats if many else chats[0], *args, **kwargs)

        return apply_chat_template

    def _chat(self, messages: Sequence[Mapping[str, Any]], report: Report) -> list[dict[str, Any]]:
        rewritten = []
        for message in messages:
            content = message["content"]
            if isinstance(content, str):
                rewritten.append(dict(message))
                continue
            question = " ".join(part["text"] for part in content if part.get("type") == "text")
            parts: list[Any] = []
            for part in content:
                file = _video_of(part)
                parts += [part] if file is None else self._frames(file, question, report)
            rewritten.append({**message, "content": parts})
        return rewritten

    def _frames(self, file: Any, question: str, report: Report) -> list[dict[str, Any]]:
        """The parts of a chat that stand for a video, and what the report says of them."""
        with self.lock:
            film = self._opened(Path(file))
            decoded = film.reader.decoded
            with report.phase("keyframes"):
                found, targets, cues = self.method.find(film, " ".join(question.split()))
            decoded = film.reader.decoded - decoded
        spent = found.ledger.spent
        for name, value in {
            "frames_looked_at": spent.get("frames", 0),
            "detector_calls": spent.get("detector_calls", 0),
            "frames_decoded": decoded,
        }.items():
            before = report[name] if name in report.quantities else 0
            report.record(name, before + value)
        told = {
            "file": str(file),
            "targets": list(targets),
            "cues": list(cues),
            "seconds": found.times.tolist(),
            "scores": [None if score != score else float(score) for score in found.scores],
            "verified": found.verified,
            "notes": [*found.notes, *(() if targets else ("nothing to look for: the frames are evenly spaced",))],
        }
        report.facts.setdefault("keyframes", []).append(told)
        return as_parts(found, self.method.stamp)

    def _opened(self, file: Path) -> Film:
        facts = (file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else ()
        key = (file.absolute(), *facts)
        if self.film is None or self.film[0] != key:
            if self.film is not None:
                self.film[1].close()
            self.film = None
            self.film = key, Film(file, self.method.looks)
        return self.film[1]


def marker_of(processor: Any, text: str) -> str:
    """How a text says where its video belongs: in the processor's own way, or as <video>."""
    own = getattr(processor, "video_token", None)
    return own if isinstance(own, str) and own in text else "<video>"


def as_parts(found: Keyframes, stamp: str) -> list[dict[str, Any]]:
    """Keyframes as parts of a chat: before every frame its stamp, if there is one."""
    from PIL import Image

    parts: list[dict[str, Any]] = []
    for time, picture in zip(found.times.tolist(), found.frames.pictures, strict=True):
        if written := stamp.format(seconds=time):
            parts.append({"type": "text", "text": written})
        parts.append({"type": "image", "image": Image.fromarray(picture)})
    return parts


def _is_file(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _parts(conversation: Any) -> list[Any]:
    """The parts of all messages of one chat or of many."""
    chats = conversation if conversation and isinstance(conversation[0], list | tuple) else [conversation]
    contents = [message["content"] for chat in chats for message in chat]
    return [part for content in contents if not isinstance(content, str) for part in content]


def _video_of(part: Any) -> Any:
    """The file of a chat's video part; None for other parts."""
    if part.get("type") != "video":
        return None
    return next((part[name] for name in SOURCES if _is_file(part.get(name))), None)
