"""The local engine: a pool of worker processes on this machine.  Nothing has to be started first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import Empty, SimpleQueue

from mmaccel.batch.ledger import Outcome, Work
from mmaccel.batch.supervision import Settings, Stopped, Supervised


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
        todo: SimpleQueue[Work | None] = SimpleQueue()
        done: SimpleQueue[list[Outcome] | BaseException] = SimpleQueue()
        threads = [threading.Thread(target=_serve, args=(worker, todo, done, stop)) for worker in self.workers]
        for thread in threads:
            thread.start()
        under_way = 0
        try:
            for batch in work:
                todo.put(batch)
                under_way += 1
                if under_way > len(threads):  # one waits for whoever is free first
                    found = _finished(done)
                    under_way -= found[1]
                    yield found[0]
                if stop.is_set():
                    break
            while under_way:
                found = _finished(done)
                under_way -= found[1]
                yield found[0]
        finally:
            for _ in threads:
                todo.put(None)
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


def _serve(
    worker: Supervised,
    todo: SimpleQueue[Work | None],
    done: SimpleQueue[list[Outcome] | BaseException],
    stop: threading.Event,
) -> None:
    """One worker's thread: every batch that it takes is answered, be it with nothing."""
    while (work := todo.get()) is not None:
        try:
            done.put([] if stop.is_set() else worker.finish(work))
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
