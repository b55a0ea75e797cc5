"""A run whose process group is killed at random moments ends as one that nobody disturbed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import time

import pytest

from tests.batch.toys import batch, begin, hashes, ledger, outputs, toy, write


def killed_and_resumed(jobs, out, kills, longest, *options, seed=0):
    """Runs to the end; the process group dies `kills` times.  Returns how often there was something to kill."""
    drawn, hit, found = random.Random(seed), 0, []
    while hit < kills:
        process = begin(jobs, "--out", out, *options)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(drawn.uniform(0.05, longest))
        if process.poll() is not None:
            break  # all is done: later kills would hit nothing
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        hit += 1
        found.append(done_in(out))
    assert sorted(found) == found and any(found[:-1]), found  # nothing is lost, and kills met runs in the middle
    assert batch(jobs, "--out", out, *options, seconds=600).returncode == 0
    return hit


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
    jobs = write(tmp_path / "jobs.jsonl", [toy(number, seconds=0.01) for number in range(300)])
    options = "--workers", 2, "--batch-size", 3
    start = time.monotonic()
    assert batch(jobs, "--out", tmp_path / "undisturbed", *options).returncode == 0
    hit = killed_and_resumed(jobs, tmp_path / "killed", 5, 0.8 * (time.monotonic() - start), *options)
    assert hit == 5
    check_that_nothing_shows(jobs, tmp_path / "killed", tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_leave_no_trace(tmp_path):
    jobs = write(tmp_path / "jobs.jsonl", [toy(number, seconds=0.05) for number in range(1000)])
    options = "--workers", 2, "--batch-size", 4
    start = time.monotonic()
    assert batch(jobs, "--out", tmp_path / "undisturbed", *options, seconds=600).returncode == 0
    seconds = time.monotonic() - start
    hit = killed_and_resumed(jobs, tmp_path / "killed", 20, 0.15 * seconds, *options)
    assert hit == 20
    check_that_nothing_shows(jobs, tmp_path / "killed", tmp_path / "undisturbed")
