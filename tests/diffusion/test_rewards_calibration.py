"""Weighted rewards, and weights fitted to a judge."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.rewards import (
    Brightness,
    Calibrated,
    ClipScore,
    Colourfulness,
    Contrast,
    MotionMagnitude,
    PocketJudge,
    TemporalConsistency,
    calibrate,
    scored,
)
from diffusion.rewards.calibration import best_weights
from tests.diffusion.reward_inputs import mean_red, moving, pictures

GRID = (0, 0.25, 0.5, 0.75, 1)


def columns(rows: int = 40, rewards: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, rewards, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_weighted_mean_divides_by_the_sum_of_the_weights():
    images, prompts = pictures(4)
    parts = [Brightness(), Contrast(), mean_red]
    expected = sum(
        weight * part(images, prompts) for weight, part in zip((0.5, 1, 0.25), parts, strict=True)
    ) / 1.75  # fmt: skip
    got = Calibrated(rewards=parts, weights=[0.5, 1, 0.25])(images, prompts)
    assert got.dtype == torch.float32 and torch.allclose(got, expected, atol=1e-6)
    assert torch.allclose(Calibrated(rewards=parts, weights=[1, 2, 0.5])(images, prompts), expected, atol=1e-6)


def test_it_scores_videos_with_rewards_of_both_kinds_row_by_row():
    videos, prompts = moving(3)
    reward = Calibrated(rewards=[ClipScore(), MotionMagnitude(log=True), TemporalConsistency()], weights=[1, 0.25, 0.5])
    alone = torch.cat([reward(videos[row : row + 1], prompts[row : row + 1]) for row in range(3)])
    assert torch.allclose(reward(videos, prompts), alone, atol=1e-5)


def test_a_reward_of_weight_zero_is_not_computed_and_what_is_not_finite_never_wins():
    def broken(images, prompts):
        raise AssertionError

    def missing(images, prompts):
        return [0.0, np.nan, 1.0]

    images, prompts = pictures(3)
    got = scored(Calibrated(rewards=[broken, Brightness(), missing], weights=[0, 1, 1]), images, prompts)
    assert got.values[1] == -np.inf and got.not_finite == 1 and got.values[[0, 2]].isfinite().all()


def test_context_and_a_missing_list_of_prompts_reach_every_reward():
    seen = []

    def reward(images, prompts, **context):
        seen.append((prompts, context))
        return torch.zeros(len(images))

    images, _ = pictures(2)
    Calibrated(rewards=[reward, reward], weights=[1, 1])(images, None, seed=1)
    assert seen == [([None, None], {"seed": 1})] * 2


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        ([Contrast()], [1, 2], "every reward has one weight; got 1 rewards and 2 weights"),
        ([Contrast()], [0], r"weights are numbers from 0 up, not all 0; got \[0.0\]"),
        ([Contrast()], [-1], r"got \[-1.0\]. To reward less of something, pass a function that gives its negative"),
        ([Contrast()], [np.nan], "weights are numbers from 0 up"),
        ([], [], "weights are numbers from 0 up, not all 0; got \\[\\]"),
        ([3], [1], "a reward is a Reward, a callable .*; got 3"),
    ],
)
def test_weights_that_mean_nothing_are_refused(rewards, weights, message):
    with pytest.raises(ValueError, match=message):
        Calibrated(rewards=rewards, weights=weights)


@given(st.lists(st.sampled_from(GRID), min_size=3, max_size=3).filter(lambda weights: any(weights)))
def test_planted_weights_are_recovered_up_to_scale(planted):
    scores = columns()
    weights, correlation = best_weights(scores, scores @ torch.tensor(planted, dtype=torch.float64), GRID)
    assert correlation == pytest.approx(1)
    scale = max(planted) / float(weights.max())
    assert (weights * scale).tolist() == pytest.approx(planted)
    assert float(weights.sum()) <= sum(planted) + 1e-9  # the smallest of those that point the same way


@given(st.integers(0, 1000))
def test_no_other_weights_on_the_grid_correlate_better(seed):
    scores, judge = columns(12, 2, seed), columns(12, 1, seed + 1)[:, 0]
    weights, correlation = best_weights(scores, judge, GRID)
    tried = [
        (np.corrcoef(scores @ torch.tensor(w, dtype=torch.float64), judge)[0, 1], -sum(w))
        for w in np.ndindex(5, 5)
        if any(w)
    ]
    assert correlation == pytest.approx(max(tried)[0], abs=1e-9)
    assert np.corrcoef(scores @ weights, judge)[0, 1] == pytest.approx(correlation, abs=1e-9)


def test_a_constant_reward_and_one_that_only_disturbs_get_no_weight():
    scores = columns(rewards=2)
    judge = scores[:, 0]
    constant = torch.full((40, 1), 0.1, dtype=torch.float32).double()
    weights, correlation = best_weights(torch.cat([constant, scores], dim=1), judge, GRID)
    assert weights.tolist() == [0, 0.25, 0] and correlation == pytest.approx(1)


def test_rewards_that_cancel_are_no_combination():
    scores = columns(rewards=1)
    weights, correlation = best_weights(torch.cat([scores, -scores], dim=1), scores[:, 0], GRID)
    assert weights.tolist() == [0.25, 0] and correlation == pytest.approx(1)


def test_a_shift_of_a_reward_and_any_scale_of_the_judge_change_nothing():
    scores, judge = columns(), columns(seed=5)[:, 0]
    weights, correlation = best_weights(scores, judge, GRID)
    moved, again = best_weights(scores + torch.tensor([100.0, -3, 0]), 7 * judge - 2, GRID)
    assert torch.equal(weights, moved) and correlation == pytest.approx(again)


def test_calibrate_finds_the_reward_that_the_judge_follows():
    images, prompts = pictures(24)
    shuffled = prompts[12:] + prompts[:12]
    images, prompts = torch.cat([images, images]), prompts + shuffled
    found = calibrate([Brightness(), ClipScore(), Colourfulness()], PocketJudge(), images, prompts)
    assert found.weights[1] > 0 and found.correlation > 0.6
    got = np.corrcoef(found(images, prompts), PocketJudge()(images, prompts))[0, 1]
    assert got == pytest.approx(found.correlation, abs=1e-4)
    assert Calibrated.from_dict(found.to_dict()) == found


def test_a_judge_may_be_a_list_of_scores_and_rows_without_a_number_are_left_out():
    images, prompts = pictures(6)
    scores = Contrast()(images, prompts).tolist()
    images = images.clone()
    images[2] = np.nan
    for judge in ([*scores[:5], np.nan], torch.tensor([*scores[:5], np.inf])):
        found = calibrate(["contrast", mean_red], judge, images, prompts)
        assert found.weights == (0.25, 0) and found.correlation == pytest.approx(1)
    assert calibrate([Contrast()], "contrast", images, prompts).correlation == pytest.approx(1)


@pytest.mark.parametrize(
    ("rewards", "judge", "settings", "message"),
    [
        ([], "contrast", {}, "there is nothing to calibrate: pass at least one reward"),
        (["contrast"], [1, 1, 1, 1], {}, "the judge gives 1 to every row; there is nothing to fit to"),
        (["contrast"], [1, np.nan, 2, np.inf], {}, "at least 3 rows with finite scores; got 2 of 4. Pass more images"),
        (["contrast"], [1, 2], {}, r"has to give one real number a row, \[4\]; got the shape \[2\]"),
        ([lambda images, prompts: [0.1] * 4], [1, 2, 3, 4], {}, "every reward gives the same to all rows; pass images"),
        (
            ["contrast"],
            [1, 2, 3, 4],
            {"grid": (0,)},
            r"the grid holds weights from 0 up, one of them posi.*; got \[0\]",
        ),
        (["contrast"], [1, 2, 3, 4], {"grid": (-1, 1)}, r"the grid holds weights from 0 up"),
        (["contrast"] * 9, [1, 2, 3, 4], {}, "5 weights for 9 rewards are 1,953,125 combinations, more than 1,000,000"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(rewards, judge, settings, message):
    images, prompts = pictures(4)
    with pytest.raises(ValueError, match=message):
        calibrate(rewards, judge, images, prompts, **settings)
