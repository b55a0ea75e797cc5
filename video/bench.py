"""`mmaccel bench video`: what keyframe searches find, what they look at, and how fast files are read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mmaccel.bench import Bench, BenchResult, Progress, as_list, describe_machine, option, silent

PARTS = ("quality", "growth", "reading", "memory", "answers")


@dataclass(frozen=True, kw_only=True)
class VideoBench(Bench):
    """Searches of pocket haystacks with an imperfect detector or another, and reading beside OpenCV.

    Figures of quality, by SEARCH.MINUTES: `recall` (of event centres, within 5 s), `hit` (a keyframe within 5 s of the
    event), `share` (frames looked at, over the video's seconds), `seconds` a question, `recall_minus_uniform` (paired),
    `recall_times_uniform`; and `cell_recall`, of the detector in a grid's cells.  "@equal": it may look at as many
    frames as T* did.
    Growth: `scaled_seconds`, `scaled_cpu` and `scaled_looks` (10 times longer, events and cues alike, over the short
    one), `blind_looks.MINUTES` (looks of T* over those of the best blind order on the same table).
    Reading: `reading.scattered`, `reading.clustered` (time over OpenCV's), `reading_cpu` (processor time likewise),
    `reading_one_thread` (time likewise, one thread each), `wrong_frames`.  Memory: `peak_mb.MINUTES`.
    Answers of pocket-llava: `accuracy.SEARCH`, `accuracy_over_uniform`.
    """

    name: ClassVar[str] = "video"

    part: Literal["all", "quality", "growth", "reading", "memory", "answers"] = option("all", "what to measure")
    minutes: str = option("10,60", "quality: lengths of the videos, with commas between")
    videos: int = option(10, "quality: videos of each length; each brings ten questions")
    frames: int = option(8, "keyframes a question")
    detector: str = option("imperfect", "a detector's name, or imperfect: colour-shape made worse")
    recall: float = option(0.7, "the share of things that the imperfect detector sees in a picture")
    false: float = option(0.05, "false finds it makes, a phrase and a small picture's area")
    reading_seconds: int = option(600, "reading: length of the video")
    rounds: int = option(7, "reading: interleaved rounds")
    folder: str = option("", "keep the generated videos and what was measured of each here, and go on from there")

    def __post_init__(self) -> None:
        if self.videos < 1 or self.frames < 1:
            raise ValueError(f"videos and frames are at least 1; got {self.videos} and {self.frames}")
        if self.reading_seconds <= 10:
            raise ValueError(
                f"the video that is read has four clusters of 10 s, so it is longer than that; got "
                f"{self.reading_seconds}"
            )

    def run(self, progress: Progress = silent) -> BenchResult:
        """Measures all parts, or the chosen one."""
        from video import bench_growth, bench_quality, bench_reading

        result = BenchResult(self.name, describe_machine())
        minutes = [int(length) for length in as_list(self.minutes)]
        measures = {
            "quality": lambda folder: bench_quality.quality(self, minutes, folder, progress),
            "answers": lambda folder: bench_quality.answers(self, min(minutes), folder, progress),
            "growth": lambda folder: bench_growth.growth(self, minutes, folder, progress),
            "reading": lambda folder: bench_reading.reading(self, folder, progress),
            "memory": lambda folder: bench_reading.memory(folder, progress),
        }
        with _folder(self.folder) as folder:
            for part in PARTS if self.part == "all" else [self.part]:
                figures, rows = measures[part](folder)
                result.figures |= figures
                result.rows += rows
        return result

    def plot(self, result: BenchResult, path: str | Path) -> None:
        """Recall over the share of frames looked at, a curve a search."""
        from mmaccel.plots import Point, pareto

        points: dict[str, list[Point]] = {}
        for name, figure in result.figures.items():
            quantity, _, setting = name.partition(".")
            if quantity == "recall":
                share = 100 * result.figures[f"share.{setting}"].value
                low, high = (figure.value if end is None else end for end in (figure.low, figure.high))
                points.setdefault(setting.rpartition(".")[0], []).append(
                    Point(max(share, 0.1), figure.value, low, high)
                )
        if not points:
            raise ValueError("the plot shows recall, and this run measured none; set part=quality or part=all")
        pareto(
            points,
            path,
            title=f"pocket haystack, {self.frames} keyframes",
            cost="frames looked at (% of seconds)",
            quality="recall of event centres, 95 % intervals",
        )


@contextmanager
def _folder(given: str) -> Iterator[Path]:
    if not given:
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)
        return
    Path(given).mkdir(parents=True, exist_ok=True)
    yield Path(given)
