"""The study of estimates says what is so on a Gaussian, whose estimates are exact."""

import numpy as np
import pytest

from diffusion.bench_estimates import Study, compare, gain
from mmaccel.bench import BenchResult, describe_machine, get_bench
from tests.diffusion.gaussian import GaussianHost, linear_grid
from tests.diffusion.searching import finished


@pytest.fixture(scope="module")
def rows():
    found = []
    for seed in range(12):
        study = Study(None, siblings=6, depths=(1, 2, 5))
        finished(
            study, GaussianHost(linear_grid(5), seed=seed, reward=lambda clean: clean.flatten(1).mean(1)).problem()
        )
        found.append({"notes": study.notes})
    return found


def test_an_estimate_of_a_linear_reward_of_a_gaussian_ranks_as_the_ends_do(rows):
    for row in rows:
        for note in row["notes"]:
            for name in ("depth 1", "depth 2", "depth 5"):
                assert np.argsort(note[name]).tolist() == np.argsort(note["ends"]).tolist()


def test_more_depth_gains_nothing_there_and_costs_choice(rows):
    figures = compare(rows)
    for step in range(4):
        same = [figures[f"gain.depth-{depth}.step-{step}"].value for depth in (1, 2, 5)]
        assert same[0] == pytest.approx(same[1]) and same[0] == pytest.approx(same[2]) and same[0] > 0
        assert figures[f"equal_cost.depth-1.step-{step}"].value == same[0]
        assert figures[f"equal_cost.depth-5.step-{step}"].value < same[0]


def test_the_depth_that_reaches_the_end_is_the_end():
    study = Study(None, siblings=3, depths=(4,))
    finished(study, GaussianHost(linear_grid(5)).problem())
    assert study.notes[0]["depth 4"] == pytest.approx(study.notes[0]["ends"])


def test_the_gain_is_over_the_mean_of_all_ends():
    assert gain(np.array([0.1, 0.9]), np.array([1.0, 2.0, 6.0])) == -1.0


def test_the_curves_are_drawn(rows, tmp_path):
    bench = get_bench("diffusion").from_options({"part": "estimates", "pairs": 2})
    bench.plot(BenchResult("diffusion", describe_machine(), compare(rows)), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
