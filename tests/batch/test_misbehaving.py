"""Jobs that crash, hang, run out of memory or fill the disk fail alone, and the message says what to do."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import time

import pytest

from tests.batch.toys import COMMAND, batch, begin, environment, hashes, ledger, outputs, toy, write
from tests.batch.waiting import wait_for_outputs

CASES = {
    "segfault": r"the worker died \(SIGSEGV\); what it wrote last is in .*workers.log",
    "hang": r"no end after 1 s of running 1 jobs; the worker was stopped: give more time with --timeout",
    "memory": r"MemoryError: one toy too large",
    "raise": r"RuntimeError: a broken toy",
    "killed": r"SIGKILL\); most likely the system ran out of memory: use fewer --workers or a smaller --batch-size",
    "link": r"the task toy wrote '\d+.link'; a job writes files named stem.ending only",
    "nothing": r"the task toy wrote no file for job \d+ of the batch",
}


def test_every_poison_fails_alone_and_says_what_to_do(tmp_path):
    rows = [toy(number) for number in range(4 * len(CASES))]
    for place, do in enumerate(CASES):
        rows[4 * place + 1] |= {"do": do}
    path, out = write(tmp_path / "jobs.jsonl", rows), tmp_path / "out"
    done = batch(path, "--out", out, "--workers", 2, "--batch-size", 2, "--retries", 0, "--timeout", 1)
    assert done.returncode == 1
    failed = [row for row in ledger(out) if row["status"] != "done"]
    assert [row["number"] for row in failed] == [4 * place + 1 for place in range(len(CASES))]
    for row, message in zip(failed, CASES.values(), strict=True):
        assert re.search(message, row["error"]), row["error"]
        assert row["error"] in done.stderr
    assert len(outputs(out)) == 3 * len(CASES)
    assert "21 done, 7 failed, 0 waiting" in done.stdout
    assert "the same command tries what failed again" in done.stderr
    assert "Fatal Python error: Segmentation fault" in (out / "workers.log").read_text()


def test_a_worker_that_is_killed_once_changes_nothing(tmp_path):
    rows = [toy(number) for number in range(12)]
    rows[5] |= {"do": "once", "marker": str(tmp_path / "marker")}
    path = write(tmp_path / "jobs.jsonl", rows)
    options = "--batch-size", 4, "--workers", 2
    assert batch(path, "--out", tmp_path / "out", *options).returncode == 0
    assert (tmp_path / "marker").exists()
    assert [row["attempts"] for row in ledger(tmp_path / "out")] == [1] * 4 + [2] * 4 + [1] * 4
    assert batch(path, "--out", tmp_path / "again", *options).returncode == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "again")


def test_a_batch_that_is_too_large_for_memory_is_halved_and_the_ledger_says_so(tmp_path):
    rows = [toy(number, do="crowd" if number < 8 else "write") for number in range(16)]
    assert batch(write(tmp_path / "jobs.jsonl", rows), "--out", tmp_path / "out", "--batch-size", 8).returncode == 0
    assert [row["together"] for row in ledger(tmp_path / "out")] == [4] * 8 + [8] * 8


def test_what_may_pass_is_tried_again_and_the_error_counts_the_tries(tmp_path):
    path = write(tmp_path / "jobs.jsonl", [toy(0), toy(1, do="raise")])
    done = batch(path, "--out", tmp_path / "out", "--retries", 2)
    assert "RuntimeError: a broken toy (tried 3 times)" in done.stderr
    path = write(tmp_path / "jobs.jsonl", [toy(0), toy(1, do="memory")])
    assert "tried" not in batch(path, "--out", tmp_path / "other", "--retries", 2).stderr.partition("the same")[0]


def test_a_full_disk_fails_one_job_and_the_rest_finish(tmp_path):
    """By a limit on the size of files, which needs no rights; see below for a file system that is full."""
    path = write(tmp_path / "jobs.jsonl", [toy(number, do="fill" if number == 3 else "write") for number in range(12)])
    done = subprocess.run(
        [*COMMAND, str(path), "--out", str(tmp_path / "out"), "--batch-size", "4"],
        env=environment(), capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "the disk is full, or a limit on file sizes was met" in done.stderr
    assert "make room, and run the same command again" in done.stderr
    assert [row["number"] for row in ledger(tmp_path / "out") if row["status"] == "failed"] == [3]


def test_a_full_file_system_fails_one_job_and_a_resume_with_room_mends_it(tmp_path):
    small, out = tmp_path / "small", tmp_path / "small" / "out"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here; the limit on file sizes stands for a full one")
    try:
        path = write(tmp_path / "jobs.jsonl", [toy(n, do="fill" if n == 3 else "write") for n in range(12)])
        done = batch(path, "--out", out, "--batch-size", 4)
        assert done.returncode == 1 and os.strerror(errno.ENOSPC) in done.stderr
        assert [row["number"] for row in ledger(out) if row["status"] == "failed"] == [3]
        subprocess.run(["mount", "-o", "remount,size=200m", small], check=True)
        assert batch(path, "--out", out, "--batch-size", 4).returncode == 0
        assert len(outputs(out)) == 13
    finally:
        subprocess.run(["umount", small], check=True)


def test_ctrl_c_lets_batches_end_and_a_second_one_stops_at_once(tmp_path):
    quick = write(tmp_path / "quick.jsonl", [toy(number, seconds=0.2) for number in range(100)])
    process = begin(quick, "--out", tmp_path / "quick", "--batch-size", 2)
    wait_for_outputs(tmp_path / "quick")
    os.killpg(process.pid, signal.SIGINT)
    said, complained = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "stopping: what runs will end; Ctrl-C again stops at once" in complained
    assert "jobs wait; the same command goes on" in said
    states = [row["status"] for row in ledger(tmp_path / "quick")]
    assert 0 < states.count("done") < 100 and states.count("failed") == 0
    assert len(outputs(tmp_path / "quick")) == states.count("done")

    slow = write(tmp_path / "slow.jsonl", [toy(0), toy(1, seconds=1000)])
    process = begin(slow, "--out", tmp_path / "slow", "--batch-size", 1)
    wait_for_outputs(tmp_path / "slow")
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    said, complained = process.communicate(timeout=10)
    assert process.returncode == 130 and "stopping now" in complained and "1 jobs wait" in said
    assert [row["status"] for row in ledger(tmp_path / "slow")] == ["done", "waiting"]


def test_workers_end_with_the_process_that_asked(tmp_path):
    path = write(tmp_path / "jobs.jsonl", [toy(0), toy(1, seconds=1000, text="forever")])
    process = begin(path, "--out", tmp_path / "out", "--batch-size", 1)
    wait_for_outputs(tmp_path / "out")
    workers = children(process.pid)
    assert workers
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(running(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.05)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as listed:  # noqa: PTH123
        return [int(child) for child in listed.read().split()]


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as state:  # noqa: PTH123
            return state.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_first_job_begins_soon(tmp_path):
    """The number of jobs is printed, and of toys, which load nothing, the first is done, within seconds.

    A bare start of the command is the unit, because the machine may be busy.
    """
    start = time.monotonic()
    assert batch("--help").returncode == 0
    bare = time.monotonic() - start
    path = write(tmp_path / "jobs.jsonl", [toy(number, seconds=0.05) for number in range(1000)])
    start = time.monotonic()
    process = begin(path, "--out", tmp_path / "out")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("1000 jobs in ")
    counted = time.monotonic() - start
    wait_for_outputs(tmp_path / "out")
    first = time.monotonic() - start
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert counted < 2 * bare + 1 and first < 5 * bare + 2, (bare, counted, first)
