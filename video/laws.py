"""The laws of a decorated processor, held against the plain one fed by hand with frames that were read afresh."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import mmaccel
from mmaccel.checks import LawResult
from mmaccel.methods import Unsupported
from video.detectors import Detections
from video.film import Film
from video.finding import most_frames
from video.keyframes import KeyframeSearch
from video.processors import WRAPPED, marker_of
from video.reader import Picture, open_video


class Counted:
    """A detector, and how many pictures it was shown."""

    def __init__(self, detector: Any) -> None:
        self.detector, self.shown = detector, 0
        self.whole_pictures = getattr(detector, "whole_pictures", False)

    def __call__(self, pictures: Sequence[Picture], phrases: Sequence[str]) -> list[Detections]:
        self.shown += len(pictures)
        return list(self.detector(pictures, phrases))


def keyframe_laws(processor: Any, method: KeyframeSearch, inputs: Mapping[str, Any]) -> Iterator[LawResult]:
    """What a call with a video is, by the processor alone.

    inputs: a text that says once where its video belongs, and the file as `videos`.  Raises Unsupported for others.
    """
    text, file = inputs.get("text"), inputs.get("videos")
    if not isinstance(text, str) or not isinstance(file, str | Path):
        raise Unsupported(
            f"the laws of {method.name} are checked on one text and one video file: inputs={{'text': '<video> where is "
            f"the red cross?', 'videos': 'film.mp4'}}; got {inputs!r}"
        )
    others = {"return_tensors": "pt", **{name: inputs[name] for name in inputs if name not in ("text", "videos")}}
    marker, token, kind = marker_of(processor, text), str(processor.image_token), type(processor)
    bare = {"text": text.replace(marker, " "), **others}
    before = processor(**bare)
    detector = Counted(method.detector)
    with mmaccel.applied(processor, dataclasses.replace(method, detector=detector)) as run:
        first = processor(text=text, videos=str(file), **others)
        told = run.report.facts["keyframes"][0]
        looked, calls = (run.report[name] for name in ("frames_looked_at", "detector_calls"))
        shown = detector.shown
        second = processor(text=text, videos=str(file), **others)
        beside = processor(**bare)
    with open_video(file, threads=1) as reader:
        frames = reader.frames_at(told["seconds"], method.short)
    with Film(file, method.looks) as film:
        allowed = most_frames(method.budget, len(film.seconds(method.frames)))
    stamped = "".join(method.stamp.format(seconds=second) + WRAPPED.get(token, token) for second in told["seconds"])
    pictures = [Image.fromarray(picture) for picture in frames.pictures]
    by_hand = processor(text=text.replace(marker, stamped), images=pictures, **others)
    yield LawResult("the call is the plain one with the told frames, read afresh", difference(first, by_hand), 0)
    yield LawResult("the second call equals the first", difference(second, first), 0)
    yield LawResult("a call without a video is the plain one", difference(beside, before), 0)
    yield LawResult("the looks are within the budget", looked / allowed, 1)
    yield LawResult("the ledger counts the pictures that the detector saw", abs(calls - shown), 0)
    yield LawResult("remove restores", float(type(processor) is not kind) + difference(processor(**bare), before), 0)


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The greatest difference of two calls' tensors; infinite where their names or shapes differ."""
    if set(one) != set(other) or any(one[name].shape != other[name].shape for name in one):
        return float("inf")
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)
