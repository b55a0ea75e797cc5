"""A worker: a process that loads a model once and runs batches that it is told on its standard input.

A line of JSON is a batch, a line of JSON the reply; nothing is pickled.  `python -m mmaccel.batch.worker`.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TAKEN_BACK = "taken back"
"""The line that ends what is thrown away after an error."""
WRONG = (ValueError, TypeError, ImportError, FileNotFoundError, KeyError)
"""What a wrong input raises: trying again would not help."""


def main() -> None:
    """Reads batches until the standard input ends, which it does when the process that asked is gone."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply
    requests = _Requests()
    settings = requests.next()
    host: Any = None
    loaded: tuple[str, str | None] | None = None
    failed: dict[tuple[str, str | None], str] = {}
    for task in settings["tasks"]:
        with contextlib.suppress(Exception):  # it is said when a batch needs it
            _imported(task)
    while True:
        work = requests.next()
        wanted = work["task"], work["model"]
        try:
            if wanted in failed:
                raise ValueError(failed[wanted])
            if wanted != loaded:
                host, loaded = None, None  # one model at a time is in memory
                host = _load(work, settings)
                loaded = wanted
        except Exception as error:
            failed[wanted] = _said(error)
            _reply(replies, {"error": _said(error), "kind": "load"})
            requests.drop()
            continue
        _reply(replies, {"loaded": True})
        start = time.perf_counter()
        try:
            _reply(replies, {"done": _run(host, work), "seconds": time.perf_counter() - start})
        except Exception as error:
            _reply(replies, {"error": _said(error), "kind": _kind(error)})
            del error
            _free()
            requests.drop()


class _Requests:
    """Lines of the standard input, read by a thread of its own, so that its end also ends a worker in the middle."""

    def __init__(self) -> None:
        from queue import Queue

        self.lines: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self.lines.put(line)
        os._exit(0)

    def next(self) -> Any:
        return json.loads(self.lines.get())

    def drop(self) -> None:
        """Throws away what was handed early; it comes again, if it is still wanted."""
        while self.next() != TAKEN_BACK:
            pass


def _imported(task: str) -> Any:
    from mmaccel.batch.tasks import get_task

    return get_task(task)


def _load(work: dict[str, Any], settings: dict[str, Any]) -> Any:
    from mmaccel.batch.jobs import model_folder
    from mmaccel.plain_data import adapter

    task = _imported(work["task"])
    adapter(task)  # made now, so that it takes no time of the first job's
    host = task.load(model_folder(work["model"], task, Path(settings["base"])), settings["device"])
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(settings["threads"])
    return host


def _run(host: Any, work: dict[str, Any]) -> list[dict[str, Any]]:
    from mmaccel.plain_data import build
    from mmaccel.recipes import recipe_from_data

    task = _imported(work["task"])
    methods = recipe_from_data(work["recipe"]) if work["recipe"] else []
    scratch = Path(work["scratch"])
    scratch.mkdir(parents=True)
    stems = [scratch / str(place) for place in range(len(work["seeds"]))]
    jobs = [build(task, "task", task.name, inputs) for inputs in work["inputs"]]
    reports = task.run(host, methods, jobs, work["seeds"], stems)
    files: list[dict[str, str]] = [{} for _ in stems]
    for file in sorted(scratch.iterdir()):
        if not file.stem.isdigit() or int(file.stem) >= len(stems) or not file.suffix or file.is_symlink():
            raise ValueError(f"the task {task.name} wrote {file.name!r}; a job writes files named stem.ending only")
        files[int(file.stem)][file.suffix] = str(file)
    if not all(files):
        raise ValueError(f"the task {task.name} wrote no file for job {files.index({})} of the batch")
    facts = [{ending: _facts(Path(file)) for ending, file in written.items()} for written in files]
    return [
        {"report": report, "scratch": scratched, "files": found}
        for report, scratched, found in zip(reports, files, facts, strict=True)
    ]


def _facts(file: Path) -> tuple[str, int]:
    from mmaccel.batch.identity import file_digest

    return file_digest(file), file.stat().st_size


def _kind(error: Exception) -> str:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "memory"
    if isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error)):
        return "memory"
    if isinstance(error, OSError) and error.errno in FULL:
        return "full"
    return "wrong" if isinstance(error, WRONG) else "other"


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in FULL:
        return (
            f"the disk is full, or a limit on file sizes was met ({error.strerror}); make room, and run the same "
            "command again"
        )
    return str(error) if isinstance(error, WRONG) and str(error) else f"{type(error).__name__}: {error}"


def _free() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reply(replies: Any, data: Any) -> None:
    replies.write(json.dumps(data) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
