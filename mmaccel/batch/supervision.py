"""One worker and what happens to it: time-outs, crashes, memory.  Both engines do the same, so results are the same."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from mmaccel.batch.ledger import Outcome, Work
from mmaccel.batch.worker import TAKEN_BACK

LOADING = 3600.0  # seconds that a model may take to load
PIPE = 2**15  # bytes that go into an empty pipe even if nobody reads; Linux takes 2**16
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20)}
"""So many bytes glibc keeps between batches: to give them back and fetch them again took 2 ms of a job of 24 ms."""


@dataclass(frozen=True)
class Settings:
    """How workers work.

    base: the folder that paths in jobs are looked for from.  scratch: the folder of unfinished files.  tasks: imported
    at once.  timeout: seconds a job.  retries: of a batch whose failure may pass, and of a job alone.
    """

    base: str
    scratch: str
    log: str
    tasks: tuple[str, ...]
    device: str = "cpu"
    threads: int = 1
    timeout: float = 3600.0
    retries: int = 1


class Trouble(Exception):
    """A batch that was not done.  kind: of the failure; passing: whether trying the same again may help."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.passing = kind in ("died", "timeout", "other")


class Stopped(Exception):
    """The run ends now; the batch is as if it had not been started."""


Early = Callable[[], Work | None]
"""Gives the batch that comes after the one under way, if there is one by now."""


def no_other() -> None:
    """No batch comes after this one, as far as is known."""


class Supervised:
    """A worker process, started at once and again when it is needed and gone.  Used by one thread; `kill` by any.

    It may be handed one batch early, so that it need not wait for it.  That batch begins when the one before has ended
    well; if that fails, or the worker dies, it is as if it had not been handed.
    """

    def __init__(self, settings: Settings, device: str | None = None) -> None:
        self.settings, self.device = settings, device or settings.device
        self.ended = threading.Event()
        self.loading = 0.0
        """Seconds that the last model took to load, imports included."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""
        self._early: tuple[Work, Path] | None = None
        self._start()

    def finish(self, work: Work, early: Early = no_other) -> list[Outcome]:
        """What became of every job of a batch.

        A failure that may pass is tried again, whole.  Then, or when memory runs out, the batch is halved, and halved
        again, so that what one job does to a worker costs the others nothing but time.

        early: asked once the batch has begun; what it gives is handed to the worker, and is to be finished next.
        """
        return self._finish(work, self.settings.retries, early)

    def _finish(self, work: Work, retries: int, early: Early) -> list[Outcome]:
        attempts = 0
        while True:
            attempts += 1
            try:
                return self._attempt(work, attempts, early)
            except Trouble as trouble:
                if trouble.passing and attempts <= retries:
                    continue
                if len(work) == 1 or trouble.kind == "load":
                    error = f"{trouble} (tried {attempts} times)" if attempts > 1 else str(trouble)
                    return [Outcome(number, attempts, len(work), 0.0, error) for number in work.numbers]
            middle = len(work) // 2
            halves = work.part(0, middle), work.part(middle, len(work))
            return [outcome for half in halves for outcome in self._finish(half, self._tries(half), no_other)]

    def _tries(self, half: Work) -> int:
        return self.settings.retries if len(half) == 1 else 0

    def _attempt(self, work: Work, attempts: int, early: Early) -> list[Outcome]:
        scratch = self._handed(work)
        try:
            start = time.perf_counter()
            reply = self._reply(LOADING, "loading its model")
            self.loading = time.perf_counter() - start
            if "loaded" in reply:
                if (upcoming := early()) is not None:
                    self._hand_early(upcoming)
                reply = self._reply(self.settings.timeout * len(work), f"running {len(work)} jobs")
            if "error" in reply:
                self._take_back()
                raise Trouble(reply["error"], reply["kind"])
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        share = reply["seconds"] / len(work)
        return [
            Outcome(number, attempts, len(work), share, **found)
            for number, found in zip(work.numbers, reply["done"], strict=True)
        ]

    def _handed(self, work: Work) -> Path:
        """Hands a batch to the worker, unless it has it; the folder of its unfinished files."""
        if self._early is not None and self._early[0] is not work:
            self._end()  # it is at a batch that nobody asks for any more
        if self._early is None:
            return self._hand(work)
        (_, scratch), self._early = self._early, None
        return scratch

    def _hand(self, work: Work) -> Path:
        scratch, line = self._request(work)
        self._send(line)
        return scratch

    def _hand_early(self, work: Work) -> None:
        """Unless it is too long: a worker that hangs reads nothing, and who writes to it would hang with it."""
        scratch, line = self._request(work)
        if len(line) <= PIPE:
            self._send(line)
            self._early = work, scratch

    def _request(self, work: Work) -> tuple[Path, bytes]:
        """The folder of a batch's unfinished files, and the line that asks for it."""
        scratch = Path(self.settings.scratch, uuid.uuid4().hex)
        inputs = [self._resolved(work.task, inputs) for inputs in work.inputs]
        return scratch, _line({**asdict(work), "inputs": inputs, "scratch": str(scratch)})

    def _take_back(self) -> None:
        """After an error a worker throws away what it reads, which is what it was handed early, up to this line."""
        self._early = None
        self._send(_line(TAKEN_BACK))

    def _resolved(self, task: str, inputs: dict[str, Any]) -> dict[str, Any]:
        from mmaccel.batch.tasks import get_task

        files = get_task(task).files
        base = self.settings.base
        return {name: str(Path(base, value)) if name in files and value else value for name, value in inputs.items()}

    def _start(self) -> None:
        with self._lock:
            if self.ended.is_set():
                raise Stopped
            with Path(self.settings.log).open("a") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "mmaccel.batch.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env={**KEPT, **os.environ, **dict.fromkeys(THREADS, str(self.settings.threads))},
                )
            self._read = b""
        self._send(_line({**asdict(self.settings), "device": self.device}))

    def _send(self, line: bytes) -> None:
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # that it is gone shows when its reply is read
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _reply(self, seconds: float, doing: str) -> dict[str, Any]:
        """The worker's next line, which may have come together with the one before."""
        assert self._process is not None and self._process.stdout is not None
        replies, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._read:
            if not wait([replies], max(0.0, deadline - time.monotonic())):
                self._end()
                raise Trouble(
                    f"no end after {seconds:g} s of {doing}; the worker was stopped: give more time with --timeout, or "
                    "look at what this job asks for",
                    "timeout",
                )
            new = os.read(replies, 65536)
            if not new:
                raise self._died()
            self._read += new
        line, _, self._read = self._read.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _died(self) -> Exception:
        """What to raise when the worker is gone."""
        code = self._end()
        if self.ended.is_set():
            return Stopped()
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"exit code {code}"
        mend = (
            "most likely the system ran out of memory: use fewer --workers or a smaller --batch-size"
            if name == "SIGKILL"
            else f"what it wrote last is in {self.settings.log}"
        )
        return Trouble(f"the worker died ({name}); {mend}", "died")

    def _end(self) -> int:
        """Kills what is left of the process; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        early, self._early = self._early, None
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what was not sent is lost, as it has to be
                if stream is not None:
                    stream.close()
        code = process.wait()
        if early is not None:
            shutil.rmtree(early[1], ignore_errors=True)
        return code

    def kill(self) -> None:
        """Ends the worker now, for good; the thread that waits for it gets `Stopped`."""
        with self._lock:
            self.ended.set()
            if (process := self._process) is not None:
                process.kill()

    def close(self) -> None:
        """Ends an idle worker."""
        self.ended.set()
        self._end()


def _line(data: Any) -> bytes:
    return json.dumps(data).encode() + b"\n"
