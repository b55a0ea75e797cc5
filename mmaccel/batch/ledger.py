"""The ledger of a run: one SQLite database, written by one process, and the single truth about every job.

WAL mode, a transaction for what is finished: a process that is killed at any moment leaves whole transactions, and a
reader (`--status`) never waits.  A batch is recorded with all of its jobs or not at all.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmaccel.batch.identity import digest
from mmaccel.batch.plan import Batch, Twin

VERSION = 1
NAME = "ledger.sqlite"
TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE groups (number INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, task TEXT NOT NULL, model TEXT,
    model_hash TEXT NOT NULL, recipe TEXT NOT NULL, recipe_hash TEXT NOT NULL);
CREATE TABLE jobs (number INTEGER PRIMARY KEY, line INTEGER NOT NULL, output TEXT UNIQUE NOT NULL, key TEXT,
    twin INTEGER, group_number INTEGER, batch INTEGER, seed INTEGER NOT NULL, inputs TEXT NOT NULL,
    input_hash TEXT NOT NULL, status TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, together INTEGER,
    seconds REAL, error TEXT, report TEXT, files TEXT, output_hash TEXT, finished REAL);
CREATE INDEX unfinished ON jobs (group_number, batch) WHERE batch IS NOT NULL AND status != 'done';
CREATE INDEX batches ON jobs (batch);
CREATE INDEX twins ON jobs (twin) WHERE twin IS NOT NULL;
"""
EXPORTED = """SELECT jobs.number, jobs.line, jobs.output, jobs.status, first.attempts, first.together, first.seconds,
    jobs.error, groups.task, groups.model, groups.recipe, jobs.seed, jobs.inputs, first.key, groups.recipe_hash,
    groups.model_hash, jobs.input_hash, jobs.output_hash, jobs.files, first.report, jobs.finished
    FROM jobs JOIN jobs AS first ON first.number = coalesce(jobs.twin, jobs.number)
    JOIN groups ON groups.number = first.group_number ORDER BY jobs.number"""


@dataclass(frozen=True)
class Work:
    """A batch to be done, as plain data: what an engine hands to a worker."""

    batch: int
    task: str
    model: str | None
    recipe: list[dict[str, Any]]
    numbers: list[int]
    inputs: list[dict[str, Any]]
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def part(self, start: int, end: int) -> Work:
        """Some of its jobs, as a batch of their own."""
        lists = self.numbers[start:end], self.inputs[start:end], self.seeds[start:end]
        return Work(self.batch, self.task, self.model, self.recipe, *lists)


@dataclass(frozen=True)
class Outcome:
    """What became of one job.

    together: with how many jobs, itself among them, it ran; fewer than its batch if that was halved.  error: None if it
    is done.  scratch: where its files are, by their endings; files: the SHA-256 and the size of each.
    """

    number: int
    attempts: int
    together: int
    seconds: float
    error: str | None = None
    report: Mapping[str, Any] | None = None
    scratch: Mapping[str, str] | None = None
    files: Mapping[str, tuple[str, int]] | None = None


class Ledger:
    """An open ledger.  Use it in a with-block; `open` and `read` say what is wrong with a file."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.database = database

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.database.close()

    @classmethod
    def open(cls, folder: Path) -> Ledger:
        """The ledger of an output folder, made if there is none.  Raises ValueError for one of a newer version."""
        ledger = cls(sqlite3.connect(folder / NAME, isolation_level=None))
        known = ledger._check(folder)
        ledger.database.execute("PRAGMA journal_mode = WAL")
        ledger.database.execute("PRAGMA synchronous = NORMAL")
        if not known:
            with ledger.transaction():
                for statement in filter(str.strip, TABLES.split(";")):
                    ledger.database.execute(statement)
                ledger.database.execute(f"PRAGMA user_version = {VERSION}")
        return ledger

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """The ledger of an output folder, to be read only, also while a run goes on."""
        if not (folder / NAME).is_file():
            raise FileNotFoundError(f"{folder} holds no {NAME}; give the folder of a run, its --out")
        ledger = cls(sqlite3.connect(f"{(folder / NAME).absolute().as_uri()}?mode=ro", uri=True, isolation_level=None))
        ledger._check(folder)
        return ledger

    def _check(self, folder: Path) -> int:
        try:
            version = int(self.database.execute("PRAGMA user_version").fetchone()[0])
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{folder / NAME} is no ledger ({error}); give the --out folder of a run") from None
        if version > VERSION:
            raise ValueError(
                f"{folder / NAME} was written by a newer mmaccel (ledger version {version}, this one reads {VERSION}); "
                "update mmaccel, or give another --out"
            )
        return version

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that the block writes, or nothing.  Raises OSError that says what to do if the disk is full."""
        try:
            self.database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.database.execute("COMMIT")
            except BaseException:
                if self.database.in_transaction:
                    self.database.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            raise OSError(
                f"the ledger cannot be written ({error}); nothing that was finished is lost: make room on the disk, "
                "and run the same command again"
            ) from error

    # facts of the run

    def fact(self, name: str) -> Any:
        """A fact of the run, None if it is not known."""
        found = self.database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if found is None else json.loads(found[0])

    def set_facts(self, **facts: Any) -> None:
        """Notes facts of the run."""
        rows = [(name, json.dumps(value)) for name, value in facts.items()]
        self.database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows)

    # the plan

    def add(self, found: Batch | Twin) -> None:
        """Notes planned jobs."""
        insert = (
            "INSERT INTO jobs (number, line, output, key, twin, group_number, batch, seed, inputs, input_hash, status)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'waiting')"
        )
        if isinstance(found, Twin):
            job, inputs = found.job, json.dumps(found.job.inputs)
            row = job.number, job.line, job.output, None, found.of, None, None, job.seed, inputs, job.input_hash
            self.database.execute(insert, row)
            return
        group, known = found.group, "SELECT number FROM groups WHERE key = ?"
        facts = group.key, group.task, group.model, group.model_hash, json.dumps(group.recipe), group.recipe_hash
        self.database.execute(
            "INSERT OR IGNORE INTO groups (key, task, model, model_hash, recipe, recipe_hash)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            facts,
        )
        (number,) = self.database.execute(known, (group.key,)).fetchone()
        rows = [
            (job.number, job.line, job.output, key, None, number, found.number, job.seed, json.dumps(job.inputs),
             job.input_hash)
            for job, key in zip(found.jobs, found.keys, strict=True)
        ]  # fmt: skip
        self.database.executemany(insert, rows)

    # the work

    def counts(self) -> dict[str, int]:
        """How many jobs are "done", "failed" and "waiting"."""
        found = dict(self.database.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall())
        return {status: found.get(status, 0) for status in ("done", "failed", "waiting")}

    def work(self) -> Iterator[Work]:
        """The batches with a job that is not done, whole, those of one model one after the other.

        May be read on while outcomes are recorded; none comes twice.
        """
        group, batch = -1, -1
        while found := self.database.execute(
            "SELECT group_number, batch FROM jobs WHERE batch IS NOT NULL AND status != 'done'"
            " AND (group_number, batch) > (?, ?) ORDER BY group_number, batch LIMIT 1", (group, batch)
        ).fetchone():  # fmt: skip
            group, batch = found
            yield self.batch(batch)

    def batch(self, number: int) -> Work:
        """One batch, whole."""
        rows = self.database.execute(
            "SELECT task, model, recipe, jobs.number, inputs, seed FROM jobs JOIN groups"
            " ON groups.number = group_number WHERE batch = ? ORDER BY jobs.number", (number,)
        ).fetchall()  # fmt: skip
        task, model, recipe = rows[0][:3]
        inputs = [json.loads(row[4]) for row in rows]
        return Work(number, task, model, json.loads(recipe), [r[3] for r in rows], inputs, [r[5] for r in rows])

    def kinds(self) -> list[tuple[int, int]]:
        """For each kind of jobs the number of its first batch, and how many jobs there are to do."""
        return self.database.execute(
            "SELECT min(batch), count(*) FROM jobs WHERE batch IS NOT NULL GROUP BY group_number ORDER BY group_number"
        ).fetchall()

    def names(self, number: int) -> list[tuple[int, str]]:
        """The number and the output name of a job, and of those that ask for the same."""
        rows = self.database.execute("SELECT number, output FROM jobs WHERE number = ?1 OR twin = ?1", (number,))
        return [(int(number), str(output)) for number, output in rows]

    def record(self, outcome: Outcome, numbers: Iterable[int]) -> None:
        """Notes what became of a job and of those that ask for the same; what is done stays done."""
        status = "done" if outcome.error is None else "failed"
        report, files = json.dumps(outcome.report), json.dumps(outcome.files)
        output_hash = digest({ending: facts[0] for ending, facts in (outcome.files or {}).items()})
        self.database.executemany(
            "UPDATE jobs SET status = ?1, attempts = attempts + ?2, together = ?3, seconds = ?4, error = ?5,"
            " report = ?6, files = ?7, output_hash = ?8, finished = ?9"
            " WHERE number = ?10 AND (status != 'done' OR ?1 = 'done')",
            [
                (status, outcome.attempts, outcome.together, outcome.seconds, outcome.error, report, files,
                 None if outcome.files is None else output_hash, time.time(), number)
                for number in numbers
            ],
        )  # fmt: skip

    def forget(self, numbers: Iterable[int]) -> None:
        """Lets jobs that are done wait again, with those whose results they share."""
        self.database.executemany(
            "UPDATE jobs SET status = 'waiting' WHERE number = (SELECT coalesce(twin, number) FROM jobs"
            " WHERE number = ?)", [(number,) for number in numbers]
        )  # fmt: skip

    def finished(self) -> Iterator[tuple[int, str, dict[str, list[Any]]]]:
        """Every job that is done: number, output name, and its files: hash and size by ending."""
        for number, output, files in self.database.execute(
            "SELECT number, output, files FROM jobs WHERE status = 'done'"
        ):
            yield number, output, json.loads(files)

    def failures(self, most: int) -> list[tuple[int, str, str]]:
        """Line, name and error of jobs that failed."""
        return self.database.execute(
            "SELECT line, output, error FROM jobs WHERE status = 'failed' ORDER BY number LIMIT ?", (most,)
        ).fetchall()

    def export(self) -> tuple[Sequence[str], Iterator[Sequence[Any]]]:
        """The names of the columns, and every job as a row."""
        found = self.database.execute(EXPORTED)
        return [column[0] for column in found.description], iter(found)
