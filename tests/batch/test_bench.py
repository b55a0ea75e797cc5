"""The bench of runs measures what it says."""

from __future__ import annotations

import pytest

from mmaccel.batch.bench import BatchBench


def test_the_ledger_records_every_job_that_it_is_timed_with():
    figures = BatchBench(part="ledger", rounds=1, rows=800, size=4).run().figures
    assert figures["ledger.jobs"].value == pytest.approx(4 * figures["ledger.batches"].value)
    assert figures["ledger.jobs"].value > 10


def test_rows_are_checked_by_the_command_itself():
    figures = BatchBench(part="rows", rows=400).run().figures
    assert figures["rows.seconds"].value > 0 and abs(figures["rows.memory"].value) < 20


def test_a_part_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="has the parts throughput, rows, ledger, start; got 'speed'"):
        BatchBench(part="speed")
    with pytest.raises(ValueError, match="has the parts"):
        BatchBench.from_options({"part": "speed"})
