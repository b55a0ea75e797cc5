"""What a run keeps: the composition of batches, twins, the ledger, the folder; and what it refuses to go on with."""

from __future__ import annotations

import csv
import json
import sqlite3
import tracemalloc

import pytest

from mmaccel.batch.jobs import JobFile
from mmaccel.batch.plan import Batch, Plan, Twin
from tests.batch.toys import batch, begin, hashes, ledger, outputs, toy, write


def planned(path, size=4, versions=None):
    return list(Plan(JobFile(path), size, lambda task: versions or {"toy": "1"}))


def test_batches_follow_from_the_file_alone_and_are_part_of_every_key(tmp_path):
    path = write(tmp_path / "a.jsonl", [toy(number) for number in range(10)])
    batches = planned(path)
    assert [[job.number for job in batch.jobs] for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    keys = [key for batch in batches for key in batch.keys]
    assert len(set(keys)) == 10
    write(path, [*(toy(number) for number in range(5)), *(toy(number, text="new") for number in range(5, 10))])
    changed = [key for batch in planned(path) for key in batch.keys]
    assert [old == new for old, new in zip(keys, changed, strict=True)] == [True] * 4 + [False] * 6
    assert not set(keys) & {key for batch in planned(path, size=5) for key in batch.keys}
    assert not set(changed) & {key for batch in planned(path, versions={"toy": "2"}) for key in batch.keys}


def test_jobs_of_other_kinds_do_not_part_a_batch(tmp_path):
    rows = []
    for number in range(4):
        answer = {"task": "generate", "prompt": "a red square", "seed": number}
        rows += [toy(number), {**answer, "output": f"b{number}"}]
        rows += [{**answer, "output": f"c{number}", "call": {"num_inference_steps": 2}}]
        search = [{"method": "best-of-n", "n": 2, "reward": "brightness"}]
        rows += [{**answer, "output": f"d{number}", "recipe": search}]
    batches = planned(write(tmp_path / "a.jsonl", rows), 4)
    sizes = sorted((batch.group.task, len(batch.jobs)) for batch in batches)
    assert sizes == [("generate", 1)] * 4 + [("generate", 4)] * 2 + [("toy", 4)]


def test_the_same_job_twice_is_done_once_and_has_both_outputs(tmp_path):
    rows = [toy(0), toy(1), {**toy(0), "output": "twin"}, {**toy(0), "output": "third"}]
    path, out = write(tmp_path / "jobs.jsonl", rows), tmp_path / "out"
    kinds = [type(found) for found in planned(path)]
    assert kinds.count(Twin) == 2 and kinds.count(Batch) == 1
    assert batch(path, "--out", out).returncode == 0
    files = outputs(out)
    assert files["part-0/0.txt"] == files["twin.txt"] == files["third.txt"] != files["part-1/1.txt"]
    assert [row["status"] for row in ledger(out)] == ["done"] * 4
    (out / "outputs" / "twin.txt").unlink()
    done = batch(path, "--out", out)
    assert "1 outputs are gone or changed; their jobs run again" in done.stdout and outputs(out) == files


def test_one_worker_two_workers_and_a_resume_give_the_same_hashes(tmp_path):
    path = write(tmp_path / "jobs.jsonl", [toy(number) for number in range(30)])
    for name, workers in (("one", 1), ("two", 2)):
        assert batch(path, "--out", tmp_path / name, "--workers", workers, "--batch-size", 4).returncode == 0
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    before = ledger(tmp_path / "one")
    done = batch(path, "--out", tmp_path / "one")  # its batch size is the run's own
    assert "30 of 30 are done already" in done.stdout
    assert ledger(tmp_path / "one") == before


def test_another_run_other_terms_and_other_versions_are_refused(tmp_path):
    path, out = write(tmp_path / "jobs.jsonl", [toy(number) for number in range(3)]), tmp_path / "out"
    assert batch(path, "--out", out).returncode == 0
    other = write(tmp_path / "other.jsonl", [toy(number) for number in range(4)])

    def refused(*arguments):
        done = batch(*arguments)
        assert done.returncode == 2, done.stdout
        return " ".join(done.stderr.split())

    assert f"holds another run, of {path}: rows, order, recipes" in refused(other, "--out", out)
    assert "begun with --batch-size 8, and results depend on it; got 4" in refused(
        path, "--out", out, "--batch-size", 4
    )
    assert "is not empty; give a new folder" in refused(path, "--out", out, "--no-resume")
    change(out, "UPDATE facts SET value = json_set(value, '$.torch', '1.0') WHERE name = 'versions'")
    assert "was begun with torch 1.0, and now it is" in refused(path, "--out", out)
    change(out, "PRAGMA user_version = 99")
    assert "written by a newer mmaccel (ledger version 99, this one reads 1)" in refused(path, "--out", out)
    assert "written by a newer mmaccel" in refused("--status", out)
    (out / "ledger.sqlite").write_text("no database" * 100)
    assert "is no ledger" in refused(path, "--out", out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert "holds 'thesis.tex' and no ledger of ours" in refused(path, "--out", tmp_path / "full")
    assert "holds no ledger.sqlite; give the folder of a run" in refused("--status", tmp_path / "full")
    assert "holds no jobs" in refused(write(tmp_path / "none.jsonl", []), "--out", tmp_path / "none")
    assert "where do the outputs go? Add --out DIR" in refused(path)
    assert "which jobs?" in refused()
    assert "there is no engine 'moon'; known: local, ray" in refused(path, "--out", out, "--engine", "moon")


def change(out, statement):
    database = sqlite3.connect(out / "ledger.sqlite")
    database.execute(statement)
    database.commit()
    database.close()


def test_a_run_is_alone_in_its_folder_and_its_status_can_be_read_meanwhile(tmp_path):
    path, out = write(tmp_path / "jobs.jsonl", [toy(number, seconds=0.3) for number in range(60)]), tmp_path / "out"
    process = begin(path, "--out", out, "--batch-size", 1)
    try:
        while not (out / "outputs").exists() or not outputs(out):
            assert process.poll() is None
        assert "another run is at work in" in batch(path, "--out", out).stderr
        told = batch("--status", out)
        assert told.returncode == 0 and "0 failed" in told.stdout and f"jobs: {path}" in told.stdout
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_the_ledger_is_exported_as_a_table(tmp_path, ending):
    if ending == ".parquet":
        pytest.importorskip("pyarrow", reason="PYARROW IS MISSING, so Parquet is not tested: it is an extra")
    path, out = write(tmp_path / "jobs.jsonl", [toy(0), toy(1), {**toy(0), "output": "twin"}]), tmp_path / "out"
    assert batch(path, "--out", out).returncode == 0
    file = tmp_path / f"results{ending}"
    assert "3 jobs" in batch("--export", out, file).stdout
    if ending == ".parquet":
        from pyarrow import parquet

        rows = parquet.read_table(file).to_pylist()
    elif ending == ".csv":
        rows = list(csv.DictReader(file.open()))
    else:
        rows = [json.loads(line) for line in file.open()]
    assert [row["output"] for row in rows] == ["part-0/0", "part-1/1", "twin"]
    assert (
        rows[0]["key"] == rows[2]["key"] and rows[0]["output_hash"] == rows[2]["output_hash"] != rows[1]["output_hash"]
    )
    assert {row["task"] for row in rows} == {"toy"} and {str(row["attempts"]) for row in rows} == {"1"}
    assert json.loads(rows[0]["report"]) == {"spent": {"toys": 1}}
    assert "an export ends in .parquet, .csv, .jsonl" in batch("--export", out, tmp_path / "x.xls").stderr


def test_check_runs_nothing_for_good_and_estimates_from_a_trial(tmp_path):
    path = write(tmp_path / "jobs.jsonl", [toy(number, seconds=0.05) for number in range(100)])
    done = batch(path, "--check", "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    assert "all 100 jobs are well formed" in done.stdout and "100 toys" in done.stdout
    (seconds,) = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("about")]
    assert seconds > 5  # 100 times 0.05 s, and the start of a worker
    assert [file.name for file in tmp_path.iterdir()] == ["jobs.jsonl"]
    write(path, [toy(0, do="raise")])
    assert "1 of 1 kinds of jobs failed in their trial: RuntimeError: a broken toy" in batch(path, "--check").stderr


def test_memory_does_not_grow_with_the_rows(tmp_path):
    def peak(rows):
        path = write(tmp_path / "jobs.jsonl", (toy(number) for number in range(rows)))
        tracemalloc.start()
        for _ in Plan(JobFile(path), 8, lambda task: {}):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)
    assert peak(1500) < peak(500) + 50_000
