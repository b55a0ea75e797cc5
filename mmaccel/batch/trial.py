"""A short trial: one batch of each kind of jobs, to say what all of them will take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmaccel.batch.jobs import JobFile
from mmaccel.batch.ledger import Ledger
from mmaccel.batch.run import LOG, SCRATCH, Terms
from mmaccel.batch.supervision import Settings, Supervised


@dataclass(frozen=True)
class Trial:
    """What one batch of a kind took.  seconds: a job; evaluations: of all jobs of the kind; error: if it failed."""

    task: str
    model: str | None
    recipe: str
    jobs: int
    seconds: float
    loading: float
    evaluations: dict[str, float]
    error: str | None


def try_out(ledger: Ledger, file: JobFile, terms: Terms, out: Path, timeout: float) -> list[Trial]:
    """Runs the first batch of every kind in a planned ledger whose folder may be thrown away."""
    assert terms.device is not None and terms.threads is not None
    device = "cuda:0" if terms.device == "cuda" else terms.device
    settings = Settings(str(file.folder), str(out / SCRATCH), str(out / LOG), (), device, terms.threads, timeout, 0)
    worker, trials = Supervised(settings), []
    try:
        for batch, jobs in ledger.kinds():
            work = ledger.batch(batch)
            outcomes = worker.finish(work)
            error = next((outcome.error for outcome in outcomes if outcome.error), None)
            spent: dict[str, float] = {}
            for outcome in outcomes:
                for name, amount in (outcome.report or {}).get("spent", {}).items():
                    spent[name] = spent.get(name, 0.0) + amount * jobs / len(work)
            recipe = ", ".join(method["method"] for method in work.recipe) or "none"
            seconds = sum(outcome.seconds for outcome in outcomes) / len(work)
            trials.append(Trial(work.task, work.model, recipe, jobs, seconds, worker.loading, spent, error))
    finally:
        worker.close()
    return trials
