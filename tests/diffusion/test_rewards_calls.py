"""What rewards are given, and what becomes of what they answer: numbers that are none, wrong shapes, errors."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.rewards import ClipScore, Colourfulness, JpegCompressibility, MotionMagnitude, checked, scored
from tests.diffusion.reward_inputs import mean_red, moving, pictures
from tests.diffusion.test_rewards_contract import Greenness

# The rule for wrong rewards


@given(st.lists(st.floats(width=32), min_size=1, max_size=6))
def test_what_is_not_finite_never_wins_and_is_counted(values):
    got = checked(torch.tensor(values), len(values))
    assert got.values.dtype == torch.float64 and got.values.device.type == "cpu"
    for value, kept in zip(values, got.values.tolist(), strict=True):
        assert kept == (value if np.isfinite(value) else -np.inf)
    assert got.not_finite == sum(not np.isfinite(value) for value in values)


@pytest.mark.parametrize(
    "rewards",
    [
        [1, 2.5],
        (1, 2.5),
        [torch.tensor(1.0), torch.tensor(2.5)],
        np.array([1, 2.5]),
        np.array([2.5, 1])[::-1],
        np.array([1, 2.5], dtype=np.float16),
        torch.tensor([1, 2.5], dtype=torch.bfloat16),
        torch.tensor([1, 2.5], requires_grad=True),
    ],
)
def test_any_real_numbers_one_a_row_are_taken(rewards):
    assert checked(rewards, 2).values.tolist() == [1, 2.5] and checked(rewards, 2).not_finite == 0


def test_no_rows_have_no_rewards():
    assert checked([], 0).values.tolist() == [] and checked(torch.zeros(0), 0).not_finite == 0


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, TypeError, r"mean_red has to give one real number a row, \[2\]; got None. Does it lack its return\?"),
        ("good", TypeError, r"has to give one real number a row, \[2\]; got str 'good'. Give a tensor of floats"),
        ([1, None], TypeError, r"got list \[1, None\]"),
        ({"a": 1}, TypeError, r"got dict"),
        (torch.ones(2, dtype=torch.complex64), TypeError, r"got torch.complex64. Give its real part"),
        (np.ones(2, dtype=complex), TypeError, r"got ndarray array\(\[1.\+0.j"),
        ([[1, 2], [3]], ValueError, r"got a list of lists that differ in length"),
        (torch.ones(2, 1), ValueError, r"\[2\]; got the shape \[2, 1\]. Average over the other axes, or squeeze them"),
        (torch.ones(3), ValueError, r"got the shape \[3\]. Give the rewards in the order of the rows"),
        (0.5, ValueError, r"got the shape \[\]. A single number says nothing about each row"),
        ([], ValueError, r"got the shape \[0\]"),
    ],
)
def test_a_wrong_result_names_the_reward_what_came_and_what_should(given, error, message):
    with pytest.raises(error, match=message):
        checked(given, 2, mean_red)
    with pytest.raises(error, match=r"the reward has to give one real number a row|got a list of lists"):
        checked(given, 2)


def test_a_reward_that_raises_is_named_in_a_note():
    def broken(images, prompts, **context):
        raise KeyError("weights")

    with pytest.raises(KeyError) as caught:
        scored(broken, torch.zeros(2, 3, 8, 8), ["", ""])
    assert "raised by the reward" in caught.value.__notes__[0] and "broken" in caught.value.__notes__[0]
    assert "for 2 rows, images [2, 3, 8, 8]" in caught.value.__notes__[0]


def test_context_reaches_a_reward_and_ours_ignore_it():
    seen: dict[str, Any] = {}

    def reward(images, prompts, **context):
        seen.update(context)
        return [0.0] * len(images)

    images, prompts = pictures(2)
    scored(reward, images, prompts, seed=3)
    assert seen == {"seed": 3}
    assert torch.equal(Colourfulness()(images, prompts, seed=3), Colourfulness()(images, prompts))


# The input


@pytest.mark.parametrize(
    ("images", "prompts", "error", "message"),
    [
        ([1], [""], TypeError, r'greenness scores a tensor \[rows, 3, .*got list. Pipelines .* output_type="pt"'),
        (torch.zeros(3, 8, 8), [""], ValueError, r"got \[3, 8, 8\]; the 3 are RGB"),
        (torch.zeros(2, 4, 8, 8), [""], ValueError, r"got \[2, 4, 8, 8\]"),
        (
            torch.zeros(2, 3, 6, 8, 8),
            [""],
            ValueError,
            r"got \[2, 3, 6, 8, 8\]; frames stand .*transpose\(1, 2\)",
        ),
        (
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
            [""],
            TypeError,
            r"floats in 0..1; got torch.uint8. .* / 255",
        ),
        (torch.full((1, 3, 8, 8), -0.5), [""], ValueError, r"got values from -0.5 to -0.5. .*-1..1, pass \(images / 2"),
        (torch.zeros(2, 3, 8, 8), ["a"], ValueError, r"a list of prompts, one a row; got 1 prompts for 2 rows"),
        (torch.zeros(2, 3, 8, 8), "aa", ValueError, r"a list of prompts, one a row; got 'aa' for 2 rows"),
    ],
)
def test_input_that_breaks_the_contract_is_refused(images, prompts, error, message):
    with pytest.raises(error, match=message):
        Greenness()(images, prompts)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_picture_scores_nan_and_spoils_no_other(value):
    images, prompts = pictures(3)
    broken = images.clone()
    broken[1, 2, 5, 5] = value
    for reward in (ClipScore(), JpegCompressibility(), Colourfulness()):
        got, plain_scores = scored(reward, broken, prompts), scored(reward, images, prompts)
        assert got.not_finite == 1 and got.values[1] == -torch.inf
        assert torch.allclose(got.values[[0, 2]], plain_scores.values[[0, 2]], atol=1e-5)


def test_rewards_compute_in_float32_without_gradients_even_under_autocast():
    images, prompts = pictures(2)
    expected = ClipScore()(images, prompts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ClipScore()(images.requires_grad_(), prompts)
    assert got.dtype == torch.float32 and not got.requires_grad and torch.equal(got, expected)
    assert ClipScore()(images.detach().half(), prompts).dtype == torch.float32


def test_no_rows_score_nothing():
    assert Greenness()(torch.zeros(0, 3, 8, 8), []).shape == (0,)
    assert MotionMagnitude()(torch.zeros(0, 4, 3, 32, 32), []).shape == (0,)


def test_a_reward_for_pictures_gives_videos_the_mean_over_frames():
    videos, prompts = moving()
    for reward in (Greenness(), ClipScore(), JpegCompressibility()):
        by_frame = torch.stack([reward(videos[:, frame], prompts) for frame in range(videos.shape[1])])
        assert torch.allclose(reward(videos, prompts), by_frame.mean(dim=0), atol=1e-5)


def test_a_missing_list_of_prompts_is_a_list_of_none():
    images, _ = pictures(2)
    assert torch.equal(Colourfulness()(images, None), Colourfulness()(images, [None, None]))
