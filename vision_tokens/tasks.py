"""The batch task `answer`: questions about pictures, a batch at a time, or about videos, one by one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from mmaccel.batch.tasks import Task
from mmaccel.methods import Method


@dataclass(frozen=True, kw_only=True)
class Answer(Task):
    """Answer a question about a picture or a video; methods on frames choose what is seen of a video.

    image, video: files, one of them.  longest: most tokens of an answer.
    """

    name: ClassVar[str] = "answer"
    files: ClassVar[tuple[str, ...]] = ("image", "video")
    alike: ClassVar[tuple[str, ...]] = ("longest",)
    default_model: ClassVar[str | None] = "pocket-llava"

    question: str
    image: str | None = None
    video: str | None = None
    longest: Annotated[int, Field(ge=1)] = 64

    def __post_init__(self) -> None:
        if (self.image is None) == (self.video is None):
            raise ValueError('a question is about one file: give "image" or "video", and not both')

    @classmethod
    def check(cls, methods: Sequence[Method]) -> None:
        for method in methods:
            if method.stages[0] in ("denoise", "sample"):
                raise ValueError(f"{method.name} draws, and answers nothing; see `mmaccel methods` for those that do")

    @classmethod
    def load(cls, model: Path | None, device: str) -> Any:
        from vision_tokens.loading import load

        assert model is not None, "this task has a default model"
        loaded, processor = load(model)
        return loaded.to(device), processor

    @classmethod
    def run(
        cls, host: Any, methods: Sequence[Method], jobs: Sequence[Answer], seeds: Sequence[int], stems: Sequence[Path]
    ) -> list[dict[str, Any]]:
        from vision_tokens.answering import ask_all, prepare_all
        from vision_tokens.loading import open_picture

        model, processor = host
        on_model = [method for method in methods if method.stages[0] != "frames"]
        found: dict[int, tuple[str, dict[str, Any]]] = {}
        if pictured := [place for place, job in enumerate(jobs) if job.image is not None]:
            pictures = [open_picture(str(jobs[place].image)) for place in pictured]
            inputs = prepare_all(processor, pictures, [jobs[place].question for place in pictured]).to(model.device)
            answers = ask_all(model, processor, inputs, on_model, jobs[0].longest)
            for place, answer in zip(pictured, answers, strict=True):
                found[place] = answer.text, answer.report.to_dict(flops=False) if answer.report else {}
        for place, job in enumerate(jobs):
            if job.video is not None:
                found[place] = _about_video(model, processor, methods, on_model, job)
            facts = {"question": job.question, "answer": found[place][0]}
            Path(f"{stems[place]}.json").write_text(json.dumps(facts, indent=2) + "\n")
        return [{**found[place][1], "spent": {"prompts": 1}} for place in range(len(jobs))]


def _about_video(
    model: Any, processor: Any, methods: Sequence[Method], on_model: Sequence[Method], job: Answer
) -> tuple[str, dict[str, Any]]:
    """An answer about the keyframes of a video, and the report."""
    from mmaccel.answering import answer
    from mmaccel.api import report
    from vision_tokens.answering import decorated

    on_frames = [method for method in methods if method.stages[0] == "frames"]
    with decorated(processor, on_frames), decorated(model, on_model):
        said = answer(model, processor, str(job.video), job.question, longest=job.longest)
        done = report(model).to_dict(flops=False) if on_model else {}
    return said.text, {**done, "keyframes": said.keyframes.facts}
