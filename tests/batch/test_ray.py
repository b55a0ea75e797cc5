"""The Ray engine gives what the local one gives, on one machine and on three of which one is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.batch.toys import COMMAND, batch, begin, environment, hashes, ledger, outputs, toy, write
from tests.batch.waiting import wait_for_outputs

pytest.importorskip("ray", reason="RAY IS MISSING, so its engine is not tested: pip install 'mmaccel[batch]'")

CLUSTER = """
import json, sys, time
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
others = [cluster.add_node(num_cpus=1) for _ in range(2)]
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(others[0], allow_graceful=False)
print("gone", flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


@pytest.mark.slow
def test_hashes_are_those_of_the_local_engine_and_a_poison_fails_alone(tmp_path):
    path = write(
        tmp_path / "jobs.jsonl", [toy(number, do="segfault" if number == 5 else "write") for number in range(16)]
    )
    options = "--batch-size", 2, "--retries", 0, "--workers", 2
    assert batch(path, "--out", tmp_path / "local", *options).returncode == 1
    done = batch(path, "--out", tmp_path / "ray", *options, "--engine", "ray", seconds=300)
    assert done.returncode == 1, done.stderr
    assert "the worker died (SIGSEGV)" in done.stderr
    assert hashes(tmp_path / "local") == hashes(tmp_path / "ray")
    assert outputs(tmp_path / "local") == outputs(tmp_path / "ray")


@pytest.mark.slow
def test_ctrl_c_stops_and_the_same_command_goes_on(tmp_path):
    path, out = write(tmp_path / "jobs.jsonl", [toy(number, seconds=0.3) for number in range(60)]), tmp_path / "out"
    for presses in (1, 2):
        process = begin(path, "--out", out, "--batch-size", 1, "--engine", "ray")
        finished = len(outputs(out)) if (out / "outputs").exists() else 0
        wait_for_outputs(out, more_than=finished, seconds=120)
        for _ in range(presses):
            os.kill(process.pid, signal.SIGINT)
            time.sleep(0.2)
        said, complained = process.communicate(timeout=60)
        assert process.returncode == 130, complained
        assert "the same command goes on" in said
    assert batch(path, "--out", out).returncode == 0
    assert len(outputs(out)) == 60


@pytest.mark.slow
def test_a_machine_that_is_lost_in_the_middle_changes_nothing(tmp_path):
    path = write(tmp_path / "jobs.jsonl", [toy(number, seconds=0.2) for number in range(150)])
    assert batch(path, "--out", tmp_path / "local", "--batch-size", 2, "--workers", 2).returncode == 0
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert cluster.stdin is not None and cluster.stdout is not None
    try:
        address, out = cluster.stdout.readline().strip(), tmp_path / "ray"
        run = begin(path, "--out", out, "--batch-size", 2, "--workers", 3, "--engine", "ray", "--address", address)
        wait_for_outputs(out, more_than=20, seconds=240)
        cluster.stdin.write("now\n")
        cluster.stdin.flush()
        assert cluster.stdout.readline() == "gone\n"
        before = [row["status"] for row in ledger(out)].count("done")
        _, complained = run.communicate(timeout=400)
        assert run.returncode == 0, complained
        assert 0 < before < 150, "the machine was lost in the middle"
        assert hashes(out) == hashes(tmp_path / "local")
        assert outputs(out) == outputs(tmp_path / "local")
    finally:
        cluster.kill()
        cluster.wait()


def test_ray_that_is_missing_is_named(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('no ray here')")
    path = write(tmp_path / "jobs.jsonl", [toy(0)])
    done = subprocess.run(
        [*COMMAND, str(path), "--out", str(tmp_path / "out"), "--engine", "ray"],
        env=environment() | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "this engine needs Ray (no ray here): pip install 'mmaccel[batch]'" in done.stderr
