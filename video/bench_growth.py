"""How the cost of T* grows with the video: with events that grow alike, and with events that do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import numpy as np

from mmaccel.bench import Progress, mean, mean_ratio
from video.bench_quality import Found, Imperfect, ask, detector_of, haystack
from video.detectors import Detector
from video.film import Film
from video.finding import CUE
from video.pocket_haystack import Event
from video.search import Chosen, Positions, Scores, spaced
from video.tables import TableHaystack, table_of
from video.tstar import START, TStar

if TYPE_CHECKING:
    from video.bench import VideoBench

SHORT = 360  # seconds of the short video of scaled events
SCALED = 3  # pairs of such videos, at most
DETECTORS = 4  # imperfect ones that miss and imagine other things, for each of their questions
STRIDES = (5, 6, 7, 8, 10, 12)  # seconds, of the blind sweeps


def growth(bench: VideoBench, minutes: Sequence[int], folder: Path, progress: Progress) -> Found:
    """What a search costs with events ten times as long in a video ten times as long; looks beside blind orders."""
    detector = detector_of(bench)
    alike = (
        [replace(detector, seed=seed) for seed in range(DETECTORS)] if isinstance(detector, Imperfect) else [detector]
    )
    figures, rows = {}, list[dict[str, Any]]()
    cost: dict[int, list[dict[str, float]]] = {1: [], 10: []}
    for seed in range(min(bench.videos, SCALED)):
        progress("scaled events", seed, min(bench.videos, SCALED))
        made = {scale: haystack(folder, SHORT * scale, seed, scale) for scale in cost}
        for number, one in product(range(10), alike):
            for scale in cost:
                cost[scale].append(_cost(made[scale].path, made[scale].events[number], one, bench.frames))
    for quantity in ("seconds", "cpu", "looks"):
        long, short = ([row[quantity] for row in cost[scale]] for scale in (10, 1))
        figures[f"scaled_{quantity}"] = mean_ratio(long, short)
    for length in minutes:
        ours, blind = list[float](), dict[str, list[float]]()
        for seed in range(bench.videos):
            progress(f"blind orders, {length} minutes", seed, bench.videos)
            made_one = haystack(folder, 60 * length, seed)
            with Film(made_one.path) as film:
                names = [stay.name for event in made_one.events for stay in (event.target, event.cue) if stay]
                table = dict(zip(names, table_of(film, detector, names).T, strict=True))
            for event in made_one.events:
                columns = np.stack([table[stay.name] for stay in (event.target, event.cue) if stay], 1)
                ours.append(_looks_of_tstar(TableHaystack(columns, np.array([1.0, CUE][: columns.shape[1]]))))
                for name, order in _blind_orders(len(columns)).items():
                    blind.setdefault(name, []).append(_looks_of(order, columns[:, 0]))
        best = min(blind, key=lambda name: np.mean(blind[name]))
        figures[f"blind_looks.{length}"] = mean_ratio(ours, blind[best])
        figures[f"looks.tstar.{length}"], figures[f"looks.blind.{length}"] = mean(ours), mean(blind[best])
        rows.append({"part": "growth", "minutes": length, "best_blind": best, "tstar": float(np.mean(ours)),
                     **{name: float(np.mean(looks)) for name, looks in blind.items()}})  # fmt: skip
    return figures, rows


def _cost(path: Path, event: Event, detector: Detector, frames: int) -> dict[str, float]:
    """What a question costs on a video that was not open yet: seconds, a processor's seconds, frames looked at."""
    start, cpu = perf_counter(), process_time()
    with Film(path) as film:
        found = ask(film, event, TStar(), detector, frames, 0.5)
    spent = {"seconds": perf_counter() - start, "cpu": process_time() - cpu}
    return {**spent, "looks": float(found.ledger.spent["frames"])}


def _looks_of_tstar(haystack: TableHaystack) -> float:
    found = Chosen(np.empty(0, np.int64), np.full(haystack.positions, START))
    for _ in TStar().rounds(haystack, found, np.random.RandomState(0)):
        pass
    return float(haystack.looks)


def _looks_of(order: Positions, target: Scores) -> float:
    """Looks until a find stands up, in a fixed order: one a second, and one more to verify whatever is found."""
    looked = 0
    for position in order:
        looked += 1 + (target[position] > 0)
        if target[position] > TStar().threshold:
            break
    return float(looked)


def _blind_orders(total: int) -> dict[str, Positions]:
    """Sweeps at several strides, the left-out seconds in later sweeps, and the order that halves the widest gap."""
    orders = {
        f"sweep-{stride}": np.concatenate([np.arange(first, total, stride) for first in _halving(stride)])
        for stride in STRIDES
    }
    return {**orders, "halving": _halving(total)}


def _halving(total: int) -> Positions:
    """0..total-1 in the order of ever finer even grids."""
    order: dict[int, None] = {}
    count = 1
    while len(order) < total:
        order |= dict.fromkeys(spaced(total, min(count, total)).tolist())
        count *= 2
    return np.array(list(order), dtype=np.int64)
