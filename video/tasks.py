"""The batch task `keyframes`: the frames of a video that show something."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mmaccel.batch.tasks import Task
from mmaccel.methods import Method


@dataclass(frozen=True, kw_only=True)
class FindKeyframes(Task):
    """Find the frames of a video that show something; the recipe's `keyframes` says how.

    find: what to find, near: what is seen near it, lists of phrases.
    """

    name: ClassVar[str] = "keyframes"
    files: ClassVar[tuple[str, ...]] = ("video",)

    video: str
    find: list[str]
    near: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def check(cls, methods: Sequence[Method]) -> None:
        if [method.name for method in methods] not in ([], ["keyframes"]):
            raise ValueError(
                'keyframes are found by the method "keyframes" alone, with its settings, e.g. '
                f'[{{"method": "keyframes", "frames": 4}}]; got {", ".join(method.name for method in methods)}'
            )

    @classmethod
    def load(cls, model: Path | None, device: str) -> Any:
        if model is not None:
            raise ValueError(
                f"the task keyframes has no model of its own ({model}); a detector's is a setting in the recipe: "
                '[{"method": "keyframes", "detector": {"detector": "checkpoint", "model": "folder"}}]'
            )

    @classmethod
    def run(
        cls,
        host: Any,
        methods: Sequence[Method],
        jobs: Sequence[FindKeyframes],
        seeds: Sequence[int],
        stems: Sequence[Path],
    ) -> list[dict[str, Any]]:
        from video.film import Film
        from video.keyframes import KeyframeSearch
        from video.sheets import contact_sheet

        method = methods[0] if methods else KeyframeSearch()
        assert isinstance(method, KeyframeSearch)
        reports = []
        for job, stem in zip(jobs, stems, strict=True):
            with Film(job.video, method.looks) as film:
                found, _, _ = dataclasses.replace(method, targets=job.find, cues=job.near).find(film)
            contact_sheet(found).save(f"{stem}.png")
            Path(f"{stem}.json").write_text(json.dumps(found.facts, indent=2) + "\n")
            reports.append(found.facts)
        return reports
