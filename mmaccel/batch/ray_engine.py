"""The Ray engine: the same workers, as the actors of Ray Data on as many machines as the cluster has.

Batches go out and outcomes come back through Ray; files go through the output folder, which all machines share.  The
ledger stays with the process that began the run.  Ray brings back what was on a machine that is gone; what such a
machine may still write lies in its own unfinished folder, where nobody looks.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmaccel.batch.ledger import Outcome, Work
from mmaccel.batch.supervision import Settings, Stopped, Supervised

STOP = "stop"  # a file beside the unfinished ones that tells actors to begin nothing more


class RayEngine:
    """A pool of actors.  workers: how many.  address: of a cluster; None begins a local one.  gpus: for each actor."""

    def __init__(self, settings: Settings, workers: int, address: str | None = None, gpus: float = 0.0) -> None:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise ImportError(f"this engine needs Ray ({error}): pip install 'mmaccel[batch]'") from None
        self.settings, self.workers, self.gpus = settings, workers, gpus
        self._running = False
        self._begun = not ray.is_initialized()
        if self._begun:
            cpus = None if address else max(os.cpu_count() or 1, workers * settings.threads)
            ray.init(
                address or "local", num_cpus=cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False
            )
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # the bar and the ledger say the same

    def run(self, work: Iterator[Work], stop: threading.Event) -> Iterator[list[Outcome]]:
        """What became of jobs, as batches are finished; after `stop` no more are begun."""
        import ray.data

        items = [{"work": json.dumps(asdict(batch))} for batch in work]
        if not items:
            return
        done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Actor,
            batch_size=1,
            fn_constructor_args=(asdict(self.settings),),
            compute=ray.data.ActorPoolStrategy(size=self.workers),
            num_cpus=self.settings.threads,
            num_gpus=self.gpus,
        )
        threading.Thread(target=self._tell, args=(stop,), daemon=True).start()
        self._running = True
        try:
            for row in done.iter_rows():
                yield [Outcome(**outcome) for outcome in json.loads(row["outcomes"])]
        except Stopped:
            return
        finally:
            self._running = False

    def _tell(self, stop: threading.Event) -> None:
        stop.wait()
        Path(self.settings.scratch, STOP).touch()

    def kill(self) -> None:
        """Ends the run now, by an exception in the thread that waits for it; called from a signal's handler."""
        if self._running:
            self._running = False
            raise Stopped

    def close(self) -> None:
        """Ends the actors, and the local Ray if this engine began it."""
        import ray

        if self._begun:
            ray.shutdown()


class _Actor:
    """One supervised worker on some machine of the cluster."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = Settings(**settings)
        self.worker = Supervised(self.settings, "cuda:0" if self.settings.device == "cuda" else None)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        (plain,) = batch["work"]
        stopped = Path(self.settings.scratch, STOP).exists()
        outcomes = [] if stopped else self.worker.finish(Work(**json.loads(str(plain))))
        return {"outcomes": [json.dumps([asdict(outcome) for outcome in outcomes])]}
