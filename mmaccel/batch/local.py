"""The local engine: a pool of worker processes on this machine.  Nothing has to be started first."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from queue import Empty, SimpleQueue

from mmaccel.batch.ledger import Outcome, Work
from mmaccel.batch.supervision import Settings, Stopped, Supervised

IN_FLIGHT = 3  # batches a worker: one runs, one is handed early, and one waits for that to begin


class LocalEngine:
    """Workers that import what they need from the moment the engine is made.

    workers: how many processes; on "cuda" they take the machine's devices in turn.
    """

    def __init__(self, settings: Settings, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"at least one worker is needed; got {workers}")
        self.workers = [Supervised(settings, device) for device in _devices(settings.device, workers)]

    def run(self, work: Iterator[Work], stop: threading.Event) -> Iterator[list[Outcome]]:
        """What became of jobs, as batches are finished; after `stop` no more are begun."""
        waiting = Waiting(len(self.workers), stop)
        done: SimpleQueue[list[Outcome] | BaseException] = SimpleQueue()
        threads = [threading.Thread(target=_serve, args=(worker, waiting, done)) for worker in self.workers]
        for thread in threads:
            thread.start()
        under_way = 0
        try:
            for batch in work:
                waiting.add(batch)
                under_way += 1
                if under_way >= IN_FLIGHT * len(threads):
                    outcomes, answered = _finished(done)
                    under_way -= answered
                    yield outcomes
                if stop.is_set():
                    break
            while under_way:
                outcomes, answered = _finished(done)
                under_way -= answered
                yield outcomes
        finally:
            waiting.close()
            for thread in threads:
                thread.join()

    def kill(self) -> None:
        """Ends all workers now; what they were doing is as if it had not been begun."""
        for worker in self.workers:
            worker.kill()

    def close(self) -> None:
        """Ends the idle workers."""
        for worker in self.workers:
            worker.close()


class Waiting:
    """The batches that wait for one of `workers`, in order; once `stop` is set or it is closed, none is begun."""

    def __init__(self, workers: int, stop: threading.Event) -> None:
        self.workers, self._stop, self._closed = workers, stop, False
        self._batches: deque[Work] = deque()
        self._changed = threading.Condition()

    @property
    def over(self) -> bool:
        return self._closed or self._stop.is_set()

    def add(self, batch: Work) -> None:
        with self._changed:
            self._batches.append(batch)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self) -> Work | None:
        """The next batch, waited for; None once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._batches or self._closed)
            return None if self._closed else self._batches.popleft()

    def spare(self) -> Work | None:
        """The next batch, if there is one for every worker: at a run's end nobody idles for what another holds."""
        with self._changed:
            return None if self.over or len(self._batches) < self.workers else self._batches.popleft()


def _serve(worker: Supervised, waiting: Waiting, done: SimpleQueue[list[Outcome] | BaseException]) -> None:
    """One worker's thread: every batch that it takes is answered, be it with nothing."""
    held: list[Work] = []

    def early() -> Work | None:
        if not held and (spare := waiting.spare()) is not None:
            held.append(spare)
        return held[0] if held else None

    while (work := held.pop() if held else waiting.take()) is not None:
        try:
            done.put([] if waiting.over else worker.finish(work, early))
        except Stopped:
            done.put([])
        except BaseException as error:
            done.put(error)


def _finished(done: SimpleQueue[list[Outcome] | BaseException]) -> tuple[list[Outcome], int]:
    """What is finished by now, at least one batch, and how many batches that is."""
    answers = [done.get()]
    try:
        while True:
            answers.append(done.get_nowait())
    except Empty:
        pass
    outcomes: list[Outcome] = []
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        outcomes += answer
    return outcomes, len(answers)


def _devices(device: str, workers: int) -> list[str]:
    if device != "cuda":
        return [device] * workers
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise ValueError("this machine has no CUDA device; leave --device away to work on the CPU")
    return [f"cuda:{number % count}" for number in range(workers)]
