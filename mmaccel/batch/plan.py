"""Which jobs run together: fixed by the job file alone, and part of every job's identity.

Kernels are not bitwise across batch sizes, so a job's result depends on its batch; the same file gives the same
batches, on one worker or a thousand.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mmaccel.batch.identity import digest
from mmaccel.batch.jobs import Group, Job, JobFile, Problem

OPEN = 10_000  # jobs that wait for company; beyond, the oldest group goes as it is


@dataclass(frozen=True)
class Batch:
    """Jobs that run together, each with its key: the hash of its content, its batch, and the versions."""

    number: int
    group: Group
    jobs: tuple[Job, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Twin:
    """A job that asks for what an earlier one, of the number `of`, does already."""

    job: Job
    of: int


class Plan:
    """The batches of a job file, in a stream.  Memory stays flat: what was seen is kept in a temporary database.

    size: most jobs of a batch.  versions: of a task, as `identity.versions` finds them.
    Once the stream has ended: `rows`, `problems` (how many rows are wrong), and `identity`, the hash of it all.
    """

    def __init__(self, file: JobFile, size: int, versions: Callable[[str], dict[str, str]]) -> None:
        if size < 1:
            raise ValueError(f"a batch holds at least one job; got {size}")
        self.file, self.size, self.versions = file, size, versions
        self.rows = self.problems = 0
        self.tasks: dict[str, str] = {}
        """The tasks that were met, each with the hash of its versions."""
        self._identity = hashlib.sha256()
        self._numbers = 0

    @property
    def identity(self) -> str:
        """The hash of all keys and names, in order."""
        return self._identity.hexdigest()

    def __iter__(self) -> Iterator[Batch | Twin | Problem]:
        waiting: OrderedDict[str, list[Job]] = OrderedDict()
        held, seen = 0, _Seen()
        for found in self.file.jobs():
            self.rows += 1
            if isinstance(found, Job) and (earlier := seen.name(found)) is not None:
                found = [Problem(found.line, "output", f"the name {found.output!r} is taken by line {earlier}")]
            if isinstance(found, list):
                self.problems += 1
                yield from found
                continue
            if (of := seen.content(found)) is not None:
                self._identity.update(f"{of} {found.output}\n".encode())
                yield Twin(found, of)
                continue
            together = waiting.setdefault(found.group.key, [])
            together.append(found)
            held += 1
            if len(together) >= self.size or not found.group.batches:
                del waiting[found.group.key]
            elif held > OPEN:
                together = waiting.popitem(last=False)[1]
            else:
                continue
            held -= len(together)
            yield self._batch(together)
        for together in waiting.values():
            yield self._batch(together)

    def _batch(self, jobs: list[Job]) -> Batch:
        task = jobs[0].group.task
        if task not in self.tasks:
            self.tasks[task] = digest(self.versions(task))
        contents = [job.content for job in jobs]
        company = digest([self.tasks[task], contents])
        keys = tuple(digest([company, place]) for place in range(len(jobs)))
        for job, key in zip(jobs, keys, strict=True):
            self._identity.update(f"{key} {job.output}\n".encode())
        self._numbers += 1
        return Batch(self._numbers - 1, jobs[0].group, tuple(jobs), keys)


class _Seen:
    """Names and contents met so far, in a database that SQLite keeps in memory while small, on disk when large."""

    def __init__(self) -> None:
        self.database = sqlite3.connect("", isolation_level=None)
        self.database.executescript(
            "PRAGMA temp_store = FILE; PRAGMA journal_mode = OFF; PRAGMA cache_size = -8000; BEGIN;"
            "CREATE TABLE names (name TEXT PRIMARY KEY, line INT) WITHOUT ROWID;"
            "CREATE TABLE contents (content BLOB PRIMARY KEY, number INT) WITHOUT ROWID;"
        )

    def name(self, job: Job) -> int | None:
        """The line that has the job's name already; names that differ in case alone are one file on some systems."""
        return self._first("names", job.output.casefold(), job.line)

    def content(self, job: Job) -> int | None:
        """The number of the job that asks for the same."""
        return self._first("contents", bytes.fromhex(job.content), job.number)

    def _first(self, table: str, key: str | bytes, value: int) -> int | None:
        if self.database.execute(f"INSERT OR IGNORE INTO {table} VALUES (?, ?)", (key, value)).rowcount:
            return None
        column = {"names": "name", "contents": "content"}[table]
        found = self.database.execute(f"SELECT * FROM {table} WHERE {column} = ?", (key,)).fetchone()
        return int(found[1])
