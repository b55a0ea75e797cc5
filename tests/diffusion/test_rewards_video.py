"""Rewards of videos."""

import sys

import pytest
import torch

from diffusion.rewards import MotionMagnitude, MotionSmoothness, SubjectConsistency, TemporalConsistency
from diffusion.rewards.flow import optical_flow, warp
from tests.diffusion.reward_inputs import moving, pictures

REWARDS = [MotionMagnitude(), MotionMagnitude(log=True), MotionSmoothness(), TemporalConsistency()]
STILL = {"motion-magnitude": 0.0, "motion-smoothness": 1.0, "temporal-consistency": 1.0, "subject-consistency": 1.0}


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.name)
def test_a_batch_equals_its_rows_in_any_order(reward):
    videos, prompts = moving(4)
    together = reward(videos, prompts)
    alone = torch.cat([reward(videos[row : row + 1], prompts[row : row + 1]) for row in range(4)])
    order = [3, 0, 2, 1]
    assert together.shape == (4,) and together.unique().numel() > 1
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(reward(videos[order], prompts), together[order], atol=1e-5)


@pytest.mark.parametrize("reward", [*REWARDS, SubjectConsistency()], ids=lambda reward: reward.name)
def test_one_repeated_frame_does_not_move_and_is_perfectly_consistent(reward):
    images, prompts = pictures(3)
    scores = reward(images[:, None].expand(-1, 5, -1, -1, -1), prompts)
    if getattr(reward, "log", False):
        assert torch.allclose(scores, torch.full((3,), 1e-3).log() / 16)
    else:
        assert torch.allclose(scores, torch.full((3,), STILL[reward.name]), atol=1e-5)


@pytest.mark.parametrize("pixels", [32, 64, 128])
def test_motion_is_measured_in_pixels_a_frame(pixels):
    videos, _ = moving(1, frames=4, pixels=pixels, speed=0.03)
    true = 0.03 * pixels
    flow = optical_flow(videos[:, :-1], videos[:, 1:])
    side = 0.3 * 0.88 * pixels  # of the square
    for step in range(3):
        centre = (0.25 + 0.03 * step) * pixels
        columns = slice(round(centre - 0.3 * side), round(centre + 0.3 * side))
        rows = slice(round(0.5 * pixels - 0.3 * side), round(0.5 * pixels + 0.3 * side))
        right, down = flow[0, step, :, rows, columns].flatten(1).mean(dim=1).tolist()
        assert right == pytest.approx(true, rel=0.2) and abs(down) < 0.1 * true


def test_what_moves_faster_has_more_motion_and_the_logarithm_keeps_the_order():
    videos, prompts = moving(3, speed=0.02)
    slow, middle, fast = MotionMagnitude()(videos, prompts).tolist()
    assert 0 < slow < middle < fast
    logarithm = MotionMagnitude(log=True)(videos, prompts)
    assert torch.allclose(logarithm, torch.tensor([slow, middle, fast]).log() / 16, atol=1e-6)


def test_flow_of_a_shifted_picture_warps_it_back():
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(2, 3, 8, 8, generator=generator)
    frames = torch.nn.functional.interpolate(small, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    shifted = frames.roll((2, 3), dims=(-2, -1))
    flow = optical_flow(frames, shifted)
    inner = (..., slice(12, -12), slice(12, -12))
    assert torch.allclose(flow[inner].mean(dim=(-2, -1)), torch.tensor([3.0, 2.0]), atol=0.2)
    assert (warp(shifted, flow) - frames)[inner].abs().mean() < 0.01
    assert torch.allclose(warp(frames, torch.zeros(2, 2, 64, 64)), frames, atol=1e-5)


def test_even_motion_is_smoother_than_jumping_and_more_consistent_than_noise():
    videos, prompts = moving(1, frames=7, pixels=64, speed=0.03)
    jumping = videos[:, [0, 4, 1, 5, 2, 6, 3]]
    flicker = (videos + 0.3 * (torch.arange(7) % 2).reshape(1, 7, 1, 1, 1)).clamp(0, 1)
    noise = torch.rand(videos.shape, generator=torch.Generator().manual_seed(0))
    for reward in (MotionSmoothness(), TemporalConsistency()):
        scores = reward(torch.cat([videos, jumping, flicker, noise]), prompts * 4)
        assert (scores[0] > scores[1:]).all() and scores[3] < 0.8 and (scores <= 1).all() and (scores >= 0).all()
        assert scores[0] > 0.98 and scores[2] < 0.9


def test_warping_forgives_motion_that_plain_differences_punish():
    generator = torch.Generator().manual_seed(0)
    ground = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 12, generator=generator), (96, 96), mode="bicubic")
    panned = torch.stack([ground.clamp(0, 1)[..., 16:80, time : time + 64] for time in range(0, 10, 2)], dim=1)
    difference = (panned[:, 1:] - panned[:, :-1]).abs().mean()
    assert 1 - TemporalConsistency()(panned, None) < difference / 4


def test_a_subject_that_changes_is_less_consistent_than_one_that_moves():
    videos, prompts = moving(1, frames=4)
    changed = videos.clone()
    changed[:, 2:] = changed[:, 2:].flip(2)  # red becomes blue
    scores = SubjectConsistency()(torch.cat([videos, changed]), prompts * 2)
    assert scores[0] > 0.9 and scores[1] < scores[0] - 0.2


@pytest.mark.parametrize("reward", [*REWARDS, SubjectConsistency()], ids=lambda reward: reward.name)
def test_pictures_and_too_few_frames_are_refused_with_the_mend(reward):
    images, prompts = pictures(2)
    with pytest.raises(ValueError, match=r"scores videos, \[rows, frames, 3, .*got pictures, \[2, 3, 32, 32\]. Use a"):
        reward(images, prompts)
    with pytest.raises(ValueError, match=r"needs at least [23] of them; got 1. Ask the pipeline .* num_frames"):
        reward(images[:, None], prompts)


def test_motion_smoothness_needs_a_frame_between_two():
    videos, prompts = moving(1, frames=2)
    with pytest.raises(ValueError, match="motion-smoothness compares frames and needs at least 3 of them; got 2"):
        MotionSmoothness()(videos, prompts)


def test_frames_too_small_for_flow_are_refused():
    with pytest.raises(ValueError, match=r"at least 16 x 16 pixels; got 8 x 64. Enlarge them, or use .*subject-con"):
        MotionMagnitude()(torch.zeros(1, 2, 3, 8, 64), None)


def test_missing_opencv_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r'OpenCV, which cannot be imported .*pip install "mmaccel\[video\]"'):
        MotionMagnitude()(torch.zeros(1, 2, 3, 32, 32), None)
