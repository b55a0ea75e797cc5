"""A worker is handed its next batch early, and nothing else changes: what is counted, what is timed, what fails."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from mmaccel.batch.ledger import Work
from mmaccel.batch.local import LocalEngine, Waiting
from mmaccel.batch.supervision import Settings, Supervised
from tests.batch.toys import environment


def toys(number, *jobs):
    """A batch whose jobs do as they are told."""
    inputs = [{"text": f"toy {number}", **job} for job in jobs]
    numbers = [10 * number + place for place in range(len(jobs))]
    return Work(number, "toy", None, [], numbers, inputs, [0] * len(jobs))


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    (tmp_path / "scratch").mkdir()

    def make(**more):
        return Settings(str(tmp_path), str(tmp_path / "scratch"), str(tmp_path / "log"), ("toy",), **more)

    return make


@pytest.fixture
def worker(settings):
    made = []

    def make(**more):
        made.append(Supervised(settings(**more)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def written(tmp_path):
    return list((tmp_path / "scratch").rglob("*.txt"))


def done(outcomes):
    return [(outcome.number, outcome.attempts, outcome.together) for outcome in outcomes if outcome.error is None]


def test_a_batch_that_was_handed_early_begins_by_itself(tmp_path, worker):
    first, second, supervised = toys(1, {}), toys(2, {}), worker()
    supervised.finish(first, lambda: second)
    deadline = time.monotonic() + 20
    while len(written(tmp_path)) < 2:
        assert time.monotonic() < deadline, "it waits to be asked"
        time.sleep(0.01)
    (outcome,) = supervised.finish(second)
    assert outcome.number == 20 and Path(outcome.scratch[".txt"]).read_text().startswith("toy 2 ")
    assert len(written(tmp_path)) == 2  # it was not run again


@pytest.mark.parametrize("do", ["killed", "memory", "hang"])
def test_what_becomes_of_a_batch_is_no_attempt_of_the_one_that_was_handed_early(tmp_path, worker, do):
    first, second, supervised = toys(1, {}, {"do": do}), toys(2, {}, {}), worker(retries=0, timeout=0.5)
    outcomes = supervised.finish(first, lambda: second)
    assert done(outcomes) == [(10, 1, 1)] and outcomes[1].error
    assert done(supervised.finish(second)) == [(20, 1, 2), (21, 1, 2)]
    assert len(written(tmp_path)) == 3


def test_a_batch_that_is_tried_again_is_followed_by_the_same(tmp_path, worker):
    first, second, supervised = toys(1, {"do": "once", "marker": str(tmp_path / "marker")}), toys(2, {}), worker()
    asked = []
    assert done(supervised.finish(first, lambda: asked.append(1) or second)) == [(10, 2, 1)]
    assert len(asked) == 2 and done(supervised.finish(second)) == [(20, 1, 1)]


def test_time_outs_count_from_when_a_batch_begins(worker):
    first, second, supervised = toys(1, {"seconds": 2.0}), toys(2, {"seconds": 2.0}), worker(retries=0, timeout=3.2)
    assert done(supervised.finish(first, lambda: second)) == [(10, 1, 1)]
    assert done(supervised.finish(second)) == [(20, 1, 1)]


def test_a_worker_that_reads_nothing_holds_up_nobody(worker):
    first, second, supervised = (
        toys(1, {"do": "hold"}),
        toys(2, {"text": "x" * 300_000}),
        worker(retries=0, timeout=0.5),
    )
    (outcome,) = supervised.finish(first, lambda: second)
    assert "no end after 0.5 s" in str(outcome.error)
    assert done(supervised.finish(second)) == [(20, 1, 1)]


def test_a_batch_that_is_no_longer_wanted_leaves_nothing(tmp_path, worker):
    first, unwanted, third, supervised = toys(1, {}), toys(2, {"do": "hang"}), toys(3, {}), worker()
    supervised.finish(first, lambda: unwanted)
    assert done(supervised.finish(third)) == [(30, 1, 1)]
    assert len(list((tmp_path / "scratch").iterdir())) == 2


def test_no_worker_holds_what_another_could_begin():
    waiting = Waiting(2, threading.Event())
    waiting.add(toys(1, {}))
    assert waiting.spare() is None
    waiting.add(toys(2, {}))
    assert waiting.spare().batch == 1 and waiting.spare() is None and waiting.take().batch == 2


def test_after_a_stop_nothing_is_begun_and_what_was_handed_early_is_dropped(tmp_path, settings):
    stop, engine = threading.Event(), LocalEngine(settings(), 1)
    batches = [toys(number, {"seconds": 0.2}) for number in range(20)]
    try:
        numbers = []
        for outcomes in engine.run(iter(batches), stop):
            stop.set()
            numbers += [number for number, _, _ in done(outcomes)]
        assert numbers and numbers == [10 * place for place in range(len(numbers))] and len(numbers) < 5
        again = engine.run(iter(batches[len(numbers) :]), threading.Event())
        rest = [number for outcomes in again for number, attempts, _ in done(outcomes) if attempts == 1]
        assert numbers + rest == [10 * number for number in range(20)]
    finally:
        engine.close()
