"""What is wrong beside the rows of a job file is said, with the mend."""

from __future__ import annotations

import sqlite3
import sys

import pytest

from mmaccel.batch.exporting import write_export
from mmaccel.batch.jobs import JobFile
from mmaccel.batch.ledger import Ledger
from mmaccel.batch.local import LocalEngine
from mmaccel.batch.plan import Plan
from mmaccel.batch.rows import count_rows
from mmaccel.batch.supervision import Settings
from tests.batch.toys import toy, write


def test_no_workers_and_empty_batches_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one worker is needed; got 0"):
        LocalEngine(Settings(str(tmp_path), str(tmp_path), str(tmp_path / "log"), ()), 0)
    with pytest.raises(ValueError, match="a batch holds at least one job; got 0"):
        Plan(JobFile(write(tmp_path / "jobs.jsonl", [toy(0)])), 0, lambda task: {})


def test_a_device_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match="has no CUDA device; leave --device away to work on the CPU"):
        LocalEngine(Settings(str(tmp_path), str(tmp_path), str(tmp_path / "log"), (), device="cuda"), 1)


def test_parquet_without_its_library_names_the_extra(tmp_path, monkeypatch):
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ImportError, match=r"a.parquet: Parquet files need pyarrow .*'mmaccel\[batch\]', or use .jsonl"):
        count_rows(tmp_path / "a.parquet")
    Ledger.open(tmp_path).database.close()
    with pytest.raises(ImportError, match=r"Parquet needs pyarrow .*'mmaccel\[batch\]', or export .csv"):
        write_export(tmp_path, tmp_path / "results.parquet")
    assert not list(tmp_path.glob(".results*"))


def test_a_ledger_that_cannot_grow_says_so_and_keeps_what_it_has(tmp_path):
    with Ledger.open(tmp_path) as ledger:
        with ledger.transaction():
            ledger.set_facts(kept=1)
        (pages,) = ledger.database.execute("PRAGMA page_count").fetchone()
        ledger.database.execute(f"PRAGMA max_page_count = {pages}")  # as a full disk does, "database or disk is full"
        with (
            pytest.raises(OSError, match=r"cannot be written \(.*disk is full\); nothing .* lost: make room"),
            ledger.transaction(),
        ):
            ledger.set_facts(lost="x" * 100_000)
        assert ledger.fact("kept") == 1 and ledger.fact("lost") is None
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
