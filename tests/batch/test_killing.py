"""A run whose process group is killed at random moments ends as one that nobody disturbed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import time

import pytest

from tests.batch.toys import batch, begin, hashes, ledger, outputs, toy, write
from tests.batch.waiting import wait_for_outputs


def killed_and_resumed(jobs, out, kills, seconds, *options, seed=0):
    """Runs to the end; the process group dies `kills` times: one in four while it starts, the others at work.

    seconds: the longest that it works before it dies.
    """
    drawn, found = random.Random(seed), []
    while len(found) < kills:
        process = begin(jobs, "--out", out, *options)
        if drawn.random() < 0.75:
            wait_for_outputs(out, more_than=len(outputs(out)) if (out / "outputs").exists() else 0, seconds=300)
            time.sleep(drawn.uniform(0, seconds))
        else:
            time.sleep(drawn.uniform(0, 2))
        assert process.poll() is None, f"it ended before {kills} kills"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        found.append(done_in(out))
    assert sorted(found) == found and len(set(found)) > kills / 3, found  # nothing is lost, and kills met work
    assert batch(jobs, "--out", out, *options, seconds=600).returncode == 0
    return found


def done_in(out):
    with contextlib.suppress(sqlite3.OperationalError):  # killed before there was a ledger
        return [row["status"] for row in ledger(out)].count("done")
    return 0


def check_that_nothing_shows(jobs, out, undisturbed):
    assert hashes(out) == hashes(undisturbed)
    assert outputs(out) == outputs(undisturbed)
    assert {row["status"] for row in ledger(out)} == {"done"}
    assert not (out / ".partial").exists()


def test_five_kills_leave_no_trace(tmp_path):
    jobs = write(tmp_path / "jobs.jsonl", [toy(number, seconds=0.02) for number in range(200)])
    options = "--workers", 2, "--batch-size", 3
    assert batch(jobs, "--out", tmp_path / "undisturbed", *options).returncode == 0
    killed_and_resumed(jobs, tmp_path / "killed", 5, 0.3, *options)
    check_that_nothing_shows(jobs, tmp_path / "killed", tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_twenty_kills_leave_no_trace(tmp_path, engine):
    if engine == "ray":
        pytest.importorskip("ray", reason="RAY IS MISSING, so its engine is not tested: pip install 'mmaccel[batch]'")
    jobs = write(tmp_path / "jobs.jsonl", [toy(number, seconds=0.05) for number in range(1000)])
    options = "--workers", 2, "--batch-size", 4
    assert batch(jobs, "--out", tmp_path / "undisturbed", *options, seconds=600).returncode == 0
    done = killed_and_resumed(jobs, tmp_path / "killed", 20, 1.5, *options, "--engine", engine)
    print(f"{engine}: jobs done at each kill: {done}")
    check_that_nothing_shows(jobs, tmp_path / "killed", tmp_path / "undisturbed")
