"""`mmaccel bench batch`: what a run costs beside its jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mmaccel.batch.jobs import JobFile, model_folder
from mmaccel.batch.ledger import Ledger, Outcome
from mmaccel.batch.local import LocalEngine
from mmaccel.batch.run import LOG, SCRATCH, Terms, carry_out, opened, planned
from mmaccel.batch.supervision import Settings
from mmaccel.batch.tasks import get_task
from mmaccel.bench import (
    Bench,
    BenchResult,
    Figure,
    Progress,
    describe_machine,
    interleave,
    median_ratio,
    option,
    silent,
)
from mmaccel.bench import median as median_of
from mmaccel.plain_data import build
from mmaccel.pocket.pictures import pictures

PARTS = ("throughput", "rows", "ledger", "start")
COMMAND = [sys.executable, "-c", "from mmaccel.cli import main; main()", "batch"]
BARE = """
import sys, time
from pathlib import Path
from mmaccel.batch.tasks import get_task
from mmaccel import pocket
get_task("answer").load(pocket.path("pocket-llava"), "cpu")
"""


@dataclass(frozen=True, kw_only=True)
class BatchBench(Bench):
    """Questions about pictures, asked of `pocket-llava` by a run and by a bare loop over the same batches.

    Figures: `throughput` (bare loop's seconds over the run's, model loaded in both), `scaling` (one worker's seconds
    over two workers'), `rows.seconds` (checking `rows` rows, imports included) and `rows.memory` (what the process's
    peak grows by from a tenth of them), `ledger.batches` and `ledger.jobs` (recorded a second, in transactions of one
    batch), `start.counted` and `start.first` (seconds until the number of jobs is printed and the first batch is
    finished), `start.bare` (imports and model load alone).
    """

    name: ClassVar[str] = "batch"

    part: str = option("all", f"one of {', '.join(PARTS)}; all of them unless told")
    rounds: int = option(5, "how often runs and bare loops take turns")
    jobs: int = option(48, "jobs of a round")
    size: int = option(8, "jobs of a batch")
    rows: int = option(100_000, "rows that are checked")

    def __post_init__(self) -> None:
        if self.part not in (*PARTS, "all"):
            raise ValueError(f"the bench batch has the parts {', '.join(PARTS)}; got {self.part!r}")

    def run(self, progress: Progress = silent) -> BenchResult:
        result = BenchResult(self.name, describe_machine())
        with tempfile.TemporaryDirectory(prefix="mmaccel-bench-") as folder:
            for part in PARTS if self.part == "all" else (self.part,):
                result.figures |= getattr(self, f"_{part}")(Path(folder), progress)
        return result

    def _throughput(self, folder: Path, progress: Progress) -> dict[str, Figure]:
        import torch

        file = JobFile(_questions(folder / "jobs.jsonl", self.jobs))
        engines = {workers: _engine(folder, workers) for workers in (1, 2)}
        task: Any = get_task("answer")
        torch.set_num_threads(1)  # as workers do
        host = task.load(model_folder(task.default_model, task, folder), "cpu")
        try:
            runs = {f"{workers} workers": self._run_of(file, engine) for workers, engine in engines.items()}
            found = interleave({"bare": self._bare_loop(file, host), **runs}, self.rounds, progress=progress)
        finally:
            for engine in engines.values():
                engine.close()
        bare, one, two = (found[name]["seconds"] for name in ("bare", "1 workers", "2 workers"))
        return {
            "throughput": median_ratio(bare, one),
            "scaling": median_ratio(one, two),
            "throughput.jobs": median_of(self.jobs / one, "jobs/s"),
        }

    def _run_of(self, file: JobFile, engine: LocalEngine) -> Any:
        def run() -> dict[str, float]:
            with self._planned(file) as (ledger, out):
                start = time.perf_counter()
                carry_out(ledger, out, engine, threading.Event(), lambda done, failed: None)
                seconds = time.perf_counter() - start
                assert ledger.counts()["done"] == self.jobs, ledger.failures(1)
            return {"seconds": seconds}

        return run

    def _bare_loop(self, file: JobFile, host: Any) -> Any:
        task = get_task("answer")

        def run() -> dict[str, float]:
            with self._planned(file) as (ledger, out):
                batches = list(ledger.work())
                start = time.perf_counter()
                for work in batches:
                    jobs = [build(task, "task", task.name, inputs) for inputs in work.inputs]
                    stems = [out / SCRATCH / str(number) for number in work.numbers]
                    task.run(host, [], jobs, work.seeds, stems)
                return {"seconds": time.perf_counter() - start}

        return run

    @contextmanager
    def _planned(self, file: JobFile) -> Iterator[tuple[Ledger, Path]]:
        with tempfile.TemporaryDirectory(prefix="run-", dir=file.folder) as made, opened(Path(made)) as ledger:
            planned(ledger, file, Terms(size=self.size), Path(made))
            yield ledger, Path(made)

    def _rows(self, folder: Path, progress: Progress) -> dict[str, Figure]:
        found: list[tuple[float, float]] = []
        for rows in (self.rows // 10, self.rows):
            progress(f"checking {rows} rows", len(found), 2)
            path, start = _questions(folder / "rows.jsonl", rows), time.perf_counter()
            memory = _peak([str(path), "--check", "--no-trial"])
            found.append((time.perf_counter() - start, memory))
        return {
            "rows.seconds": Figure(found[1][0], unit="s"),
            "rows.memory": Figure(found[1][1] - found[0][1], unit="MB"),
        }

    def _ledger(self, folder: Path, progress: Progress) -> dict[str, Figure]:
        rates = []
        for turn in range(self.rounds):
            progress("recording", turn, self.rounds)
            with self._planned(JobFile(_questions(folder / "ledger.jsonl", self.rows // 50))) as (ledger, out):
                batches = [_outcomes(work.numbers) for work in ledger.work()]
                start = time.perf_counter()
                carry_out(ledger, out, _Answers(batches), threading.Event(), lambda done, failed: None)
                rates.append(len(batches) / (time.perf_counter() - start))
        return {
            "ledger.batches": median_of(rates, "batches/s"),
            "ledger.jobs": median_of(np.asarray(rates) * self.size, "jobs/s"),
        }

    def _start(self, folder: Path, progress: Progress) -> dict[str, Figure]:
        jobs = _questions(folder / "start.jsonl", 1000)
        found: list[tuple[float, float, float]] = []
        for turn in range(self.rounds):
            progress("starting", turn, self.rounds)
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", BARE], check=True, capture_output=True)
            bare, out = time.perf_counter() - start, folder / f"start-{turn}"
            start = time.perf_counter()
            run = subprocess.Popen([*COMMAND, str(jobs), "--out", str(out)], stdout=-1, stderr=subprocess.DEVNULL)
            assert run.stdout is not None
            run.stdout.readline()
            counted = time.perf_counter() - start
            while not (out / SCRATCH).exists() or not any((out / SCRATCH).iterdir()):
                if run.poll() is not None:
                    raise RuntimeError("the run ended before its first job")
                time.sleep(0.005)
            found.append((bare, counted, time.perf_counter() - start))
            run.kill()
            run.wait()
        names = "start.bare", "start.counted", "start.first"
        return {name: median_of(column, "s") for name, column in zip(names, zip(*found, strict=True), strict=True)}


class _Answers:
    """An engine whose work is done already."""

    def __init__(self, batches: list[list[Outcome]]) -> None:
        self.batches = batches

    def run(self, work: Any, stop: threading.Event) -> Iterator[list[Outcome]]:
        yield from self.batches

    def kill(self) -> None:
        """Nothing runs."""

    def close(self) -> None:
        """Nothing is idle."""


def _outcomes(numbers: list[int]) -> list[Outcome]:
    files = {".json": ("0" * 64, 100)}
    return [Outcome(number, 1, len(numbers), 1.0, report={"spent": {}}, files=files) for number in numbers]


def _engine(folder: Path, workers: int) -> LocalEngine:
    return LocalEngine(
        Settings(str(folder), str(folder / f"scratch-{workers}"), str(folder / LOG), ("answer",)), workers
    )


def _questions(path: Path, rows: int) -> Path:
    """A job file: different questions about the pictures that come with mmaccel."""
    files = [str(picture.file) for picture in pictures("pocket-llava")]
    with path.open("w") as opened_file:
        for number in range(rows):
            row = {"task": "answer", "image": files[number % len(files)], "longest": 16, "output": f"{number:07d}"}
            question = f"what colour is the thing of number {number}?"
            opened_file.write(json.dumps({**row, "question": question}) + "\n")
    return path


def _peak(arguments: list[str]) -> float:
    """Runs the command; the peak of its memory in MB."""
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"the check failed: exit status {status}")
    return used.ru_maxrss / 1024
