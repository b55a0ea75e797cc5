"""The harness: who runs when, intervals against what statistics says they should be, results as data."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaccel import bench as harness
from mmaccel.bench import (
    Bench,
    BenchResult,
    Figure,
    bootstrap,
    get_bench,
    interleave,
    list_benches,
    mean,
    mean_difference,
    mean_ratio,
    median_ratio,
    option,
    timed,
)


def test_runs_take_turns_and_every_second_round_goes_backwards() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name) or {"turn": len(order)}) for name in "abc"}
    found = interleave(runs, rounds=3, warmup=1)
    assert "".join(order) == "abc" + "cba" + "abc" + "cba"
    assert found["a"]["turn"].tolist() == [6, 7, 12]  # the round of warming up is not counted


def test_a_steady_drift_costs_every_run_the_same() -> None:
    clock = iter(range(100))
    runs = {name: (lambda: {"seconds": float(next(clock))}) for name in "abcd"}
    found = interleave(runs, rounds=4, warmup=0)
    assert len({figures["seconds"].sum() for figures in found.values()}) == 1


def test_progress_counts_every_turn() -> None:
    seen: list[tuple[str, int, int]] = []
    interleave({"a": dict, "b": dict}, rounds=2, warmup=1, progress=lambda *call: seen.append(call))
    assert [done for _, done, _ in seen] == list(range(7))
    assert {total for *_, total in seen} == {6}


@pytest.mark.parametrize(("runs", "rounds"), [({}, 3), ({"a": dict}, 0)])
def test_nothing_to_interleave_is_said(runs: dict[str, type[dict[str, float]]], rounds: int) -> None:
    with pytest.raises(ValueError, match=f"at least one round; got {rounds} rounds of {len(runs)} runs"):
        interleave(runs, rounds)


def test_timed_measures_between_the_waits() -> None:
    calls: list[str] = []
    figures = timed(lambda: calls.append("work"), wait=lambda: calls.append("wait"))()
    assert calls == ["wait", "work", "wait"]
    assert figures["seconds"] >= 0


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says() -> None:
    rng, trials, items, inside = np.random.default_rng(0), 400, 80, 0
    for trial in range(trials):
        figure = bootstrap(lambda values: values.mean(axis=-1), rng.normal(0.3, 1.0, items), resamples=800, seed=trial)
        assert figure.low is not None and figure.high is not None
        inside += figure.low <= 0.3 <= figure.high
    assert 0.91 <= inside / trials <= 0.98  # 95 %, four standard errors, less what the percentile method gives away


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error() -> None:
    sample = np.random.default_rng(1).normal(5.0, 2.0, 2000)
    figure = mean(sample)
    assert figure.low is not None and figure.high is not None
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * sample.std() / 2000**0.5, rel=0.08)


def test_pairing_takes_out_what_two_runs_share() -> None:
    rng = np.random.default_rng(2)
    shared = rng.normal(10.0, 5.0, 300)
    first, second = shared + 0.5 + rng.normal(0, 0.1, 300), shared + rng.normal(0, 0.1, 300)
    paired = mean_difference(first, second)
    assert paired.low is not None and paired.high is not None
    assert paired.low > 0.4 and paired.high < 0.6
    ratio = median_ratio(2 * shared, shared)
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 5))
def test_an_interval_holds_its_value_and_the_seed_decides_it(right: list[bool], seed: int) -> None:
    figure = mean(right, seed=seed)
    assert figure.low is not None and figure.high is not None
    assert min(right) <= figure.low <= figure.high <= max(right)
    assert mean(right, seed=seed) == figure
    assert mean_ratio([1.0] * len(right), [1.0] * len(right)) == Figure(1.0, 1.0, 1.0, "x")


def test_samples_over_different_items_are_refused() -> None:
    with pytest.raises(ValueError, match="samples over the same items, at least one; got lengths 3, 2"):
        mean_difference([1, 0, 1], [1, 0])
    with pytest.raises(ValueError, match="at least one; got lengths 0"):
        mean([])


def test_a_ratio_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a lower one that is not zero; compare with mean_difference"):
        mean_ratio([1.0, 0.0], [0.0, 0.0])


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    result = BenchResult("b", {"cores": 2}, {"x": Figure(1.5, 1.0, 2.0, "s"), "y": Figure(3)}, [{"run": "dense"}])
    result.save(tmp_path / "result.json")
    assert BenchResult.load(tmp_path / "result.json") == result
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["figures"]["x"] == {"value": 1.5, "low": 1.0, "high": 2.0, "unit": "s"}
    assert set(written) == {"bench", "machine", "figures", "rows"}


def test_figures_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        BenchResult("b", {}, {"x": Figure(float("nan"))}).save(tmp_path / "result.json")


def test_the_machine_is_described() -> None:
    machine = harness.describe_machine()
    assert machine["device"] == "cpu" and machine["threads"] >= 1 and machine["processor"] and machine["torch"]


@dataclass(frozen=True, kw_only=True)
class Example(Bench):
    name: ClassVar[str] = "example"
    rounds: int = option(3, "how many")

    def run(self, progress: harness.Progress = harness.silent) -> BenchResult:
        return BenchResult(self.name, {}, {"rounds": Figure(self.rounds)})


def test_options_come_from_text_and_are_listed_with_their_help() -> None:
    assert Example.from_options({"rounds": "5"}).run().figures["rounds"].value == 5
    assert Example.options() == {"rounds": {"type": "int", "default": 3, "help": "how many"}}


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match="the bench example has no option 'round'; did you mean 'rounds'"):
        Example.from_options({"round": 5})
    with pytest.raises(ValueError, match=r"example: rounds: .*valid integer.*got 'many'"):
        Example.from_options({"rounds": "many"})


def test_a_bench_without_a_plot_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the bench example draws nothing"):
        Example().plot(Example().run(), tmp_path / "x.png")


def test_benches_are_found_by_name() -> None:
    assert "vision-tokens" in list_benches()
    assert get_bench("vision-tokens").name == "vision-tokens"
    with pytest.raises(ValueError, match="there is no bench 'vision-token'; did you mean 'vision-tokens'"):
        get_bench("vision-token")


def test_the_harness_is_imported_without_torch() -> None:
    code = "import mmaccel.bench, mmaccel.plots, sys; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
