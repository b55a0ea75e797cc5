"""What searches find in pocket haystacks, with a detector that misses and imagines things."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mmaccel.bench import Figure, Progress, mean, mean_difference
from mmaccel.bench_rows import kept_rows
from mmaccel.ledger import Ledger
from mmaccel.named import resolve
from video.colour_shape import ColourShape
from video.dense import AKS, BOLT, DenseRetrieval, DenseSearch, Uniform
from video.detectors import Detections, Detector
from video.film import Film
from video.finding import CUE, FilmHaystack, Keyframes, find_keyframes
from video.metrics import TOLERANCE, Agreement, temporal
from video.pocket_haystack import Event, PocketHaystack, make
from video.reader import Picture, Times
from video.search import FrameSearch
from video.tables import TableHaystack, table_of
from video.tstar import TStar

if TYPE_CHECKING:
    from video.bench import VideoBench

Found = tuple[dict[str, Figure], list[dict[str, Any]]]
SMALL = 96 * 96  # pixels; the area for which the rate of false finds is stated
EQUAL = "@equal"
LAZY: dict[str, FrameSearch] = {
    "tstar": TStar(),
    "tstar-released": TStar(proposal="spline", verification="any", selection="draw"),
    "uniform": Uniform(),
}
DENSE: dict[str, DenseSearch] = {
    name + ending: search
    for ending in ("", EQUAL)
    for name, search in {"dense-retrieval": DenseRetrieval(), "aks": AKS(), "bolt": BOLT()}.items()
}
IMAGINED = 0.45  # the greatest confidence in what is not there
ROWS = COLUMNS = 4  # of the grids in whose cells a detector's recall is measured


@dataclass(frozen=True, kw_only=True)
class Imperfect(Detector):
    """The detector of coloured shapes, made worse: it misses things, and imagines others with little confidence.

    recall: the share of things seen; false: imagined finds a phrase and 96 x 96 pixels.  What it does depends on the
    picture and the phrase alone, so the same question has the same answer.
    """

    name: ClassVar[str] = "imperfect"

    recall: float = 0.7
    false: float = 0.05
    seed: int = 0

    def __call__(self, pictures: Sequence[Picture], phrases: Sequence[str]) -> list[Detections]:
        seen = ColourShape()(pictures, phrases)
        return [self._spoilt(*pair, phrases) for pair in zip(seen, pictures, strict=True)]

    def _spoilt(self, seen: Detections, picture: Picture, phrases: Sequence[str]) -> Detections:
        height, width = picture.shape[:2]
        code = zlib.crc32(picture.tobytes())
        boxes, labels, scores = [], [], []
        for label, phrase in enumerate(phrases):
            rng = np.random.default_rng((self.seed, code, zlib.crc32(phrase.encode())))
            mine = np.flatnonzero(seen.labels == label)
            for box in mine[rng.random(len(mine)) < self.recall]:
                boxes.append(seen.boxes[box])
                labels.append(label)
                scores.append(float(seen.scores[box]))
            for _ in range(rng.poisson(self.false * height * width / SMALL)):
                x, y = rng.uniform(0, (width - 9, height - 9))
                boxes.append(np.array([x, y, x + 9, y + 9]))
                labels.append(label)
                scores.append(float(rng.uniform(0.12, IMAGINED)))
        return Detections(np.array(boxes).reshape(-1, 4), np.array(labels, np.int64), np.array(scores))


def haystack(folder: Path, seconds: int, seed: int, scale: float = 1.0, events: int = 10) -> PocketHaystack:
    """A pocket haystack in the folder; its events and cues are `scale` times as long as usual."""
    path = folder / f"haystack-{seconds}-{seed}-{scale:g}-{events}.mp4"
    unfinished = path.with_suffix(".unfinished.mp4")
    made = make(
        unfinished,
        seconds,
        seed,
        events=events,
        event_seconds=(6 * scale, 15 * scale),
        cue_seconds=60 * scale,
        write=not path.exists(),
    )
    if not path.exists():
        unfinished.rename(path)
    return replace(made, path=path)


def ask(
    film: Film, event: Event, search: FrameSearch, detector: Detector, frames: int, budget: float | int
) -> Keyframes:
    """One question, without what earlier ones learnt."""
    film.seen.clear()
    cues = [event.cue.name] if event.cue else []
    return find_keyframes(film, search, detector, [event.target.name], cues, frames=frames, budget=budget)


def detector_of(bench: VideoBench) -> Detector:
    """The detector that a bench searches with."""
    if bench.detector == Imperfect.name:
        return Imperfect(recall=bench.recall, false=bench.false)
    found: Detector = resolve(bench.detector, Detector)
    return found


def quality(bench: VideoBench, minutes: Sequence[int], folder: Path, progress: Progress) -> Found:
    """Every search on every question of videos of every length; what is done is kept in the folder, video by video."""
    detector = detector_of(bench)
    about = f"{bench.detector.replace(':', '-')}-{bench.recall:g}-{bench.false:g}-{bench.frames}"
    rows: list[dict[str, Any]] = []
    seen: list[float] = []
    for length in minutes:

        def measured(seeds: Sequence[int], length: int = length) -> Iterator[dict[str, Any]]:
            for seed in seeds:
                progress(f"{length} minutes", seed, bench.videos)
                yield _questions(haystack(folder, 60 * length, seed), detector, bench.frames)

        for video in kept_rows(f"quality-{length}-{about}", bench.videos, folder, measured, key="video"):
            seen += video["cell_recall"]
            rows += [{"part": "quality", "minutes": length, "video": video["video"], **row} for row in video["rows"]]
    figures = {"cell_recall": mean(seen)}
    for length in minutes:
        uniform = _column(rows, "uniform", length, "recall")
        for name in (*LAZY, *DENSE):
            for quantity in ("recall", "hit", "share", "seconds"):
                figures[f"{quantity}.{name}.{length}"] = mean(_column(rows, name, length, quantity))
            if name != "uniform" and any(uniform):
                ours = _column(rows, name, length, "recall")
                figures[f"recall_minus_uniform.{name}.{length}"] = mean_difference(ours, uniform)
                figures[f"recall_times_uniform.{name}.{length}"] = Figure(sum(ours) / sum(uniform), unit="x")
    return figures, rows


def _questions(made: PocketHaystack, detector: Detector, frames: int) -> dict[str, Any]:
    """Every search on every question of a video, and what the detector sees of each target in the cells of a grid.

    Dense searches see a table, made in one pass for all questions of a video: what they look at is counted, and their
    seconds are that pass's.
    """
    rows: list[dict[str, Any]] = []
    with Film(made.path) as film:
        start = perf_counter()
        names = [stay.name for event in made.events for stay in (event.target, event.cue) if stay]
        table = dict(zip(names, table_of(film, detector, names).T, strict=True))
        pass_seconds = perf_counter() - start
        cell_recall = [_cell_recall(film, detector, event) for event in made.events]
        for number, event in enumerate(made.events):
            looked = 0
            for name, search in LAZY.items():
                start = perf_counter()
                found = ask(film, event, search, detector, frames, 0.5)
                looks = found.ledger.spent.get("frames", 0)
                looked = looks if name == "tstar" else looked
                cost = {"frames": looks, "share": found.share, "seconds": perf_counter() - start}
                rows.append({"question": number, "search": name, **_scores(event, found.times), **cost})
            for name, dense in DENSE.items():
                budget = max(looked, frames) if name.endswith(EQUAL) else None
                columns = [table[stay.name] for stay in (event.target, event.cue) if stay]
                hay = TableHaystack(np.stack(columns, 1), np.array([1.0, CUE][: len(columns)]), budget)
                times = film.seconds(1)[dense.search(hay, frames).positions]
                cost = {"frames": hay.looks, "share": hay.looks / hay.positions, "seconds": pass_seconds}
                rows.append({"question": number, "search": name, **_scores(event, times), **cost})
    return {"rows": rows, "cell_recall": cell_recall}


def _scores(event: Event, times: Times) -> dict[str, float]:
    agreement = temporal([event.centre], times) or Agreement(0.0, 0.0)
    begin, end = event.target.begin - TOLERANCE, event.target.end + TOLERANCE
    hit = float(((times >= begin) & (times <= end)).any())
    return {"recall": agreement.recall, "precision": agreement.precision, "hit": hit}


def _column(rows: Sequence[dict[str, Any]], name: str, length: int, quantity: str) -> list[float]:
    return [row[quantity] for row in rows if row["search"] == name and row["minutes"] == length]


def _cell_recall(film: Film, detector: Detector, event: Event) -> float:
    """How often the detector sees the target in the cells of a grid of frames that show it."""
    seconds = film.seconds(1)
    during = np.flatnonzero((seconds >= event.target.begin) & (seconds < event.target.end - 0.2))[: ROWS * COLUMNS]
    phrases = [event.target.name]
    film.seen.clear()
    seen = FilmHaystack(film, detector, phrases, (), seconds, Ledger({})).cells(during, ROWS, COLUMNS)
    return float((seen[:, 0] > IMAGINED).mean())


def answers(bench: VideoBench, minutes: int, folder: Path, progress: Progress) -> Found:
    """pocket-llava's answers from the frames of T* and from evenly spaced ones, over the same questions."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from mmaccel import pocket
    from video.answering import answer
    from video.keyframes import KeyframeSearch

    place = pocket.path("pocket-llava")
    model = LlavaForConditionalGeneration.from_pretrained(place, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(place)
    detector = detector_of(bench)
    rows = []
    for seed in range(bench.videos):
        progress("answers", seed, bench.videos)
        made = haystack(folder, 60 * minutes, seed)
        with Film(made.path) as film:
            for number, event in enumerate(made.events):
                row: dict[str, Any] = {"part": "answers", "video": seed, "question": number, "answer": event.answer}
                for search in (TStar(), Uniform()):
                    method = KeyframeSearch(search, detector=detector, frames=bench.frames)
                    said = answer(model, processor, film, event.question, method, longest=8, alone=True).text
                    row[search.name] = float(said == event.answer)
                rows.append(row)
    ours, theirs = ([row[name] for row in rows] for name in ("tstar", "uniform"))
    return {
        "accuracy.tstar": mean(ours),
        "accuracy.uniform": mean(theirs),
        "accuracy_over_uniform": mean_difference(ours, theirs),
    }, rows
