"""A run: a job file, an output folder with its ledger, and an engine.  What is missing is done; nothing is done twice.

Workers write unfinished files below `.partial`.  One process, this one, moves finished files to their names and notes
them in the ledger, so that a worker that dies, hangs or lives on where it was thought dead changes nothing.
"""

from __future__ import annotations

import fcntl
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from mmaccel.batch.identity import versions
from mmaccel.batch.jobs import JobFile, Problem
from mmaccel.batch.ledger import NAME, Ledger, Outcome, Work
from mmaccel.batch.names import check_name, place
from mmaccel.batch.plan import Plan

OUTPUTS, SCRATCH, LOG, LOCK = "outputs", ".partial", "workers.log", "lock"
OURS = {OUTPUTS, SCRATCH, LOG, LOCK, NAME, f"{NAME}-wal", f"{NAME}-shm"}
SHOWN = 50  # problems of a job file that are told one by one


class BadJobs(ValueError):
    """A job file with rows that are wrong.  problems: the first of them."""

    def __init__(self, path: Path, problems: list[Problem], total: int, rows: int) -> None:
        more = f" (the first {len(problems)} are listed)" if total > len(problems) else ""
        super().__init__(f"{path}: {total} problems in {rows} rows{more}; nothing was run. Mend them and try again")
        self.problems = problems


class Engine(Protocol):
    """What runs batches: `mmaccel.batch.local` or `mmaccel.batch.ray_engine`."""

    def run(self, work: Iterator[Work], stop: threading.Event) -> Iterator[list[Outcome]]:
        """What became of jobs, as batches are finished; after `stop` no more are begun."""

    def kill(self) -> None:
        """Ends all that runs, now."""

    def close(self) -> None:
        """Ends what is idle."""


@dataclass(frozen=True)
class Terms:
    """What results depend on beside the jobs; kept in the ledger, and the same when a run goes on.

    size: most jobs of a batch.  threads: of a worker.  None takes the run's own, or 8, one thread, and the CPU.
    """

    size: int | None = None
    threads: int | None = None
    device: str | None = None


@contextmanager
def opened(out: Path) -> Iterator[Ledger]:
    """The ledger of an output folder, which is made, locked against a second run, and rid of unfinished files.

    Raises ValueError for a folder that holds something else, OSError if another run is at work in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (out / NAME).exists() and (others := sorted({file.name for file in out.iterdir()} - (OURS - {OUTPUTS}))):
        raise ValueError(f"{out} holds {others[0]!r} and no ledger of ours; give an empty or a new folder with --out")
    for name in (OUTPUTS, SCRATCH):
        if (out / name).is_symlink():
            raise ValueError(f"{out / name} is a link; outputs are not written through links: remove it")
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another run is at work in {out}; wait for its end, or stop it") from None
        shutil.rmtree(out / SCRATCH, ignore_errors=True)
        for name in (OUTPUTS, SCRATCH):
            (out / name).mkdir(exist_ok=True)
        with Ledger.open(out) as ledger:
            yield ledger
        shutil.rmtree(out / SCRATCH, ignore_errors=True)


def settled(ledger: Ledger, terms: Terms) -> Terms:
    """The terms with what the ledger says.  Raises ValueError where the two differ."""
    known = ledger.fact("terms")
    if known is None:
        return Terms(terms.size or 8, terms.threads or 1, terms.device or "cpu")
    names = {"size": "--batch-size", "threads": "--threads", "device": "--device"}
    for name, flag in names.items():
        given = getattr(terms, name)
        if given is not None and given != known[name]:
            raise ValueError(
                f"this run was begun with {flag} {known[name]}, and results depend on it; got {given}. Leave {flag} "
                "away to go on, or give another --out"
            )
    return Terms(**known)


def planned(ledger: Ledger, file: JobFile, terms: Terms, out: Path) -> int:
    """Notes all jobs in an empty ledger, or makes sure that they are those it has.  Returns how many jobs there are.

    Raises BadJobs, and then the ledger is as it was; ValueError if the ledger is another run's.
    """
    size, threads, device = terms.size or 8, terms.threads or 1, terms.device or "cpu"
    identity = ledger.fact("identity")
    if identity is not None:
        _same_versions(ledger, device, threads, out)
    plan = Plan(file, size, lambda task: versions([task], device, threads))
    problems: list[Problem] = []
    with ledger.transaction():
        for found in plan:
            if isinstance(found, Problem):
                problems += [found] * (len(problems) < SHOWN)
            elif identity is None:
                ledger.add(found)
        if plan.problems:
            raise BadJobs(file.path, problems, plan.problems, plan.rows)
        if not plan.rows:
            raise ValueError(f"{file.path} holds no jobs; a row is a job")
        if identity is None:
            tasks = sorted(plan.tasks)
            ledger.set_facts(
                identity=plan.identity,
                jobs_file=str(file.path.absolute()),
                terms={"size": size, "threads": threads, "device": device},
                tasks=tasks,
                versions=versions(tasks, device, threads),
            )
        elif identity != plan.identity:
            raise ValueError(
                f"{out} holds another run, of {ledger.fact('jobs_file')}: rows, order, recipes, models or input files "
                f"differ from {file.path}. Give another --out; rows that are new go into a job file of their own"
            )
    return plan.rows


def _same_versions(ledger: Ledger, device: str, threads: int, out: Path) -> None:
    known, now = ledger.fact("versions"), versions(ledger.fact("tasks"), device, threads)
    if changed := sorted(name for name in {*known, *now} if known.get(name) != now.get(name)):
        name = changed[0]
        raise ValueError(
            f"{out} was begun with {name} {known.get(name, 'absent')}, and now it is {now.get(name, 'absent')}; "
            "results would not be of one kind. Use the same environment, or give another --out"
        )


def forget_missing(ledger: Ledger, out: Path) -> int:
    """Lets jobs run again whose outputs are gone, or of another size.  Returns how many."""
    gone = []
    for number, name, files in ledger.finished():
        for ending, (_, size) in files.items():
            file = out / OUTPUTS / (check_name(name) + ending)
            if file.is_symlink() or not file.is_file() or file.stat().st_size != size:
                gone.append(number)
                break
    with ledger.transaction():
        ledger.forget(gone)
    return len(gone)


def carry_out(
    ledger: Ledger, out: Path, engine: Engine, stop: threading.Event, progress: Callable[[int, int], None]
) -> None:
    """Runs what is not done, and records it.  progress: called with how many jobs were done and how many failed."""
    for outcomes in engine.run(ledger.work(), stop):
        done = failed = 0
        with ledger.transaction():
            for outcome in outcomes:
                names = ledger.names(outcome.number)
                outcome = _placed(outcome, out, [name for _, name in names])
                ledger.record(outcome, [number for number, _ in names])
                done, failed = done + len(names) * (outcome.error is None), failed + len(names) * bool(outcome.error)
        for scratch in {Path(file).parent for outcome in outcomes for file in (outcome.scratch or {}).values()}:
            shutil.rmtree(scratch, ignore_errors=True)
        progress(done, failed)


def _placed(outcome: Outcome, out: Path, names: list[str]) -> Outcome:
    """Moves a job's files to its names; if that cannot be done, the job has failed."""
    try:
        for ending, scratch in (outcome.scratch or {}).items():
            for number, name in enumerate(names):
                file = Path(scratch)
                if number + 1 < len(names):
                    file = Path(shutil.copyfile(file, f"{scratch}-{number}"))
                place(file, out / OUTPUTS, check_name(name), ending)
    except OSError as error:
        return replace(outcome, error=f"its output cannot be put in place: {error}", files=None)
    return outcome


def summary(ledger: Ledger) -> dict[str, Any]:
    """Where a run stands: counts, its job file and terms, and the first jobs that failed."""
    return {
        **ledger.counts(),
        "jobs_file": ledger.fact("jobs_file"),
        "terms": ledger.fact("terms"),
        "versions": ledger.fact("versions"),
        "failures": ledger.failures(SHOWN),
    }
