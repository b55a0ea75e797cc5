"""The command `mmaccel batch`.

Nothing heavy is imported until the number of jobs has been printed: `mmaccel --help` reads this file.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmaccel.console import show, table, working

if TYPE_CHECKING:
    from mmaccel.batch.jobs import JobFile
    from mmaccel.batch.run import Engine, Terms
    from mmaccel.batch.supervision import Settings

ENGINES = ("local", "ray")
SHOWN_FAILURES = 20
QUIET = 30.0  # seconds between lines of progress where no terminal shows a bar


def batch(
    jobs: Annotated[Path | None, typer.Argument(metavar="JOBS", help="Jobs as .jsonl, .csv or .parquet.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where outputs and ledger go.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Validate, and estimate from a short trial.")] = False,
    trial: Annotated[bool, typer.Option(help="Whether --check runs a batch of each kind.")] = True,
    resume: Annotated[bool, typer.Option(help="Go on with the run in DIR; --no-resume wants a new DIR.")] = True,
    status: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the run in DIR stands.")] = None,
    export: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="DIR FILE", help="Write the ledger of DIR as .parquet, .csv or .jsonl."),
    ] = None,
    engine: Annotated[str, typer.Option(metavar="NAME", help="local, or ray (extra: batch).")] = "local",
    address: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Of a Ray cluster; else one is begun.")] = None,
    gpus: Annotated[float, typer.Option(min=0, help="Share of a GPU for each worker of Ray.")] = 0.0,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes, each with its own model.")] = 1,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Most jobs run together; 8 unless told.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of a worker; 1 unless told.")] = None,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu unless told, or cuda.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Most seconds of a job.")] = 3600.0,
    retries: Annotated[int, typer.Option(min=0, help="Of what crashed or took too long.")] = 1,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let recipes name functions (package.module:function).")
    ] = False,
) -> None:
    """Run many jobs from a file, each done once or reported; the same command goes on where a run stopped.

    Ctrl-C lets the batches under way end; a second one stops at once.  Exit code 1 if jobs failed, 130 if stopped.
    """
    if status is not None:
        _show_status(status)
    if export is not None:
        from mmaccel.batch.exporting import write_export

        typer.echo(f"{write_export(*export)} jobs: {export[1]}")
    if jobs is None:
        if status is None and export is None:
            raise ValueError("which jobs? Give a job file: mmaccel batch jobs.jsonl --out DIR")
        return
    if engine not in ENGINES:
        raise ValueError(f"there is no engine {engine!r}; known: {', '.join(ENGINES)}")
    if not check and out is None:
        raise ValueError("where do the outputs go? Add --out DIR (or --check, to validate only)")
    if out is not None and not resume and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new folder, or leave --no-resume away to go on")

    from mmaccel.batch.rows import count_rows

    typer.echo(f"{count_rows(jobs)} jobs in {jobs}")

    from mmaccel.batch.jobs import JobFile
    from mmaccel.batch.run import BadJobs, Terms

    file, terms = JobFile(jobs, allow_code), Terms(batch_size, threads, device)
    try:
        if check:
            _check(file, terms, trial, timeout, workers)
            return
        assert out is not None
        _run(file, out, terms, timeout, retries, _engine(engine, address, workers, gpus))
    except BadJobs as error:
        for problem in error.problems:
            typer.echo(f"{jobs}, {problem}", err=True)
        raise


def _engine(name: str, address: str | None, workers: int, gpus: float) -> Callable[[Settings], Engine]:
    def make(settings: Settings) -> Engine:
        if name == "ray":
            from mmaccel.batch.ray_engine import RayEngine

            return RayEngine(settings, workers, address, gpus)
        from mmaccel.batch.local import LocalEngine

        return LocalEngine(settings, workers)

    return make


def _run(
    file: JobFile, out: Path, terms: Terms, timeout: float, retries: int, make: Callable[[Settings], Engine]
) -> None:
    from mmaccel.batch.run import LOG, SCRATCH, carry_out, forget_missing, opened, planned, settled
    from mmaccel.batch.supervision import Settings, Stopped

    with opened(out) as ledger:
        terms = settled(ledger, terms)
        assert terms.device is not None and terms.threads is not None
        made = make(
            Settings(
                base=str(file.folder),
                scratch=str((out / SCRATCH).absolute()),
                log=str((out / LOG).absolute()),
                tasks=file.first_tasks(),
                device=terms.device,
                threads=terms.threads,
                timeout=timeout,
                retries=retries,
            )
        )
        try:
            total = planned(ledger, file, terms, out)
            if gone := forget_missing(ledger, out):
                typer.echo(f"{gone} outputs are gone or changed; their jobs run again")
            counts = ledger.counts()
            if counts["done"]:
                typer.echo(f"{counts['done']} of {total} are done already")
            stop = threading.Event()
            shown = _progress(total, counts["done"])
            with _interrupts(stop, made.kill), shown as progress, suppress(Stopped):
                carry_out(ledger, out, made, stop, progress)
        except BaseException:
            made.kill()
            raise
        finally:
            made.close()
        counts, failures = ledger.counts(), ledger.failures(SHOWN_FAILURES)
    _report(out, counts, failures)
    if counts["waiting"]:
        typer.echo(f"stopped: {counts['waiting']} jobs wait; the same command goes on")
        raise typer.Exit(130)
    if counts["failed"]:
        raise typer.Exit(1)


def _report(out: Path, counts: dict[str, int], failures: list[tuple[int, str, str]]) -> None:
    typer.echo(", ".join(f"{count} {status}" for status, count in counts.items()) + f": {out}")
    for line, name, error in failures:
        typer.echo(f"failed: {name} (line {line}): {error}", err=True)
    if counts["failed"] > len(failures):
        typer.echo(f"... and {counts['failed'] - len(failures)} more; see --export", err=True)
    if counts["failed"]:
        typer.echo("the same command tries what failed again", err=True)


def _show_status(out: Path) -> None:
    from mmaccel.batch.ledger import Ledger

    with Ledger.read(out) as ledger:
        typer.echo(f"jobs: {ledger.fact('jobs_file')}")
        _report(out, ledger.counts(), ledger.failures(SHOWN_FAILURES))


def _check(file: JobFile, terms: Terms, trial: bool, timeout: float, workers: int) -> None:
    """Plans in a temporary ledger, runs a batch of each kind, and says what all of them will take."""
    from mmaccel.batch.run import opened, planned, settled
    from mmaccel.batch.trial import try_out

    with tempfile.TemporaryDirectory(prefix="mmaccel-check-") as temporary:
        out = Path(temporary)
        with opened(out) as ledger:
            terms = settled(ledger, terms)
            rows = planned(ledger, file, terms, out)
            typer.echo(f"all {rows} jobs are well formed")
            if not trial:
                return
            with working("trying a batch of each kind"):
                trials = try_out(ledger, file, terms, out, timeout)
    listing = table("task", "model", "recipe", "jobs", "s a job", "evaluations")
    for one in trials:
        spent = ", ".join(f"{amount:.3g} {name}" for name, amount in one.evaluations.items())
        seconds = one.error or f"{one.seconds:.3g}"
        listing.add_row(one.task, one.model or "", one.recipe, str(one.jobs), seconds, spent)
    show(listing)
    if broken := [one for one in trials if one.error]:
        raise RuntimeError(f"{len(broken)} of {len(trials)} kinds of jobs failed in their trial: {broken[0].error}")
    needed = sum(one.seconds * one.jobs for one in trials) / workers + sum(one.loading for one in trials)
    typer.echo(f"about {_clock(needed)} with --workers {workers}, by one batch of each kind")


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


@contextmanager
def _interrupts(stop: threading.Event, kill: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) begins nothing more, the second ends what runs."""

    def interrupted(*_: Any) -> None:
        if stop.is_set():
            typer.echo("stopping now", err=True)
            kill()
        else:
            stop.set()
            typer.echo("stopping: what runs will end; Ctrl-C again stops at once", err=True)

    before = {number: signal.signal(number, interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[int, int], None]]:
    """A bar with jobs a second and the time left; where there is no terminal, a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    start, begun, told, counted, failed = time.monotonic(), done, time.monotonic(), done, 0
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done)

        def update(more_done: int, more_failed: int) -> None:
            nonlocal counted, failed, told
            counted, failed, now = counted + more_done, failed + more_failed, time.monotonic()
            rate = (counted + failed - begun) / max(now - start, 1e-9)
            said = f"{rate:.3g} jobs/s" + (f", {failed} failed" if failed else "")
            bar.update(task, completed=counted + failed, description=said)
            if not console.is_terminal and now - told > QUIET:
                told = now
                left = (total - counted - failed) / max(rate, 1e-9)
                typer.echo(f"{counted + failed} of {total}, {said}, {_clock(left)} left", err=True)

        yield update
