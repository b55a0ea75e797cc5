"""Rewards that need no model, and the exact judge."""

from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.rewards import Brightness, Colourfulness, Contrast, JpegCompressibility, PocketJudge, scored
from mmaccel.pocket import motion, world
from tests.diffusion.reward_inputs import as_tensor, pictures

REWARDS = [Brightness(), Contrast(), Colourfulness(), JpegCompressibility(), PocketJudge()]


def flat(*colour: float) -> torch.Tensor:
    """A picture of one colour, [1, 3, 16, 16]."""
    return torch.tensor(colour, dtype=torch.float32).reshape(1, 3, 1, 1).expand(1, 3, 16, 16)


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.name)
def test_a_batch_equals_its_rows_in_any_order(reward):
    images, prompts = pictures(5)
    crossed = [prompts[0]] * 5 if reward.name == "pocket-judge" else prompts
    together = reward(images, crossed)
    alone = torch.cat([reward(images[row : row + 1], crossed[row : row + 1]) for row in range(5)])
    order = [3, 0, 4, 2, 1]
    permuted = reward(images[order], [crossed[row] for row in order])
    assert together.shape == (5,) and together.unique().numel() > 1
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(permuted, together[order], atol=1e-5)


def test_brightness_of_white_is_one_of_black_zero_and_of_green_its_share_of_luma():
    images = torch.cat([flat(1, 1, 1), flat(0, 0, 0), flat(0, 1, 0)])
    assert torch.allclose(Brightness()(images, None), torch.tensor([1, 0, 0.587]), atol=1e-6)


def test_contrast_is_zero_for_one_tone_and_a_half_for_black_and_white():
    halves = torch.cat([torch.zeros(1, 3, 16, 8), torch.ones(1, 3, 16, 8)], dim=-1)
    scores = Contrast()(torch.cat([flat(0.3, 0.9, 0.1), halves]), None)
    assert torch.allclose(scores, torch.tensor([0, 0.5]), atol=1e-6)


def test_contrast_doubles_when_the_tones_lie_twice_as_far_apart():
    images, _ = pictures(3)
    assert torch.allclose(Contrast()(images / 2, None) * 2, Contrast()(images, None), atol=1e-6)


def test_colourfulness_is_the_papers_formula_and_zero_for_grey():
    grey = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).expand(1, 3, 16, 16)
    assert Colourfulness()(grey, None).abs().max() < 1e-3
    images, _ = pictures(3)
    red, green, blue = (255 * images).double().numpy().transpose(1, 0, 2, 3)
    for row in range(3):
        opponents = [red[row] - green[row], (red[row] + green[row]) / 2 - blue[row]]
        spread, mean = (np.hypot(*(what(o) for o in opponents)) for what in (np.std, np.mean))
        assert Colourfulness()(images, None)[row].item() == pytest.approx(spread + 0.3 * mean, rel=1e-4)


@pytest.mark.parametrize("quality", [20, 95])
def test_jpeg_compressibility_is_minus_the_kilobytes_of_the_file(quality):
    images, _ = pictures(2)
    for row, score in enumerate(JpegCompressibility(quality=quality)(images, None)):
        file = BytesIO()
        picture = (images[row] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        assert score.item() == pytest.approx(-len(file.getvalue()) / 1000)


def test_noise_compresses_worse_than_a_plain_ground_and_the_option_turns_the_sign():
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = torch.cat([noise, torch.full((1, 3, 32, 32), 0.5)])
    scores = JpegCompressibility()(images, None)
    assert scores[0] < scores[1] < 0
    assert torch.equal(JpegCompressibility(incompressible=True)(images, None), -scores)


@pytest.mark.parametrize("quality", [0, 96, 50.5, True])
def test_a_quality_that_jpeg_has_not_is_refused(quality):
    with pytest.raises(ValueError, match="the quality of a JPEG is a whole number from 1 to 95; got"):
        JpegCompressibility(quality=quality)


@given(st.integers(0, 1000))
@settings(max_examples=25)
def test_the_judge_gives_true_pictures_one_and_others_their_share_of_facts(seed):
    images, prompts = pictures(2, seed=seed)
    assert PocketJudge()(images, prompts).tolist() == [1, 1]
    crossed = prompts[::-1]
    scenes = [world.parse((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    expected = [world.score(prompt, scene) for prompt, scene in zip(crossed, scenes, strict=True)]
    assert PocketJudge()(images, crossed).tolist() == pytest.approx(expected)
    assert PocketJudge(graded=False)(images, crossed).tolist() == [float(score == 1) for score in expected]


def test_the_judge_counts_and_sees_relations():
    def thing(shape: str, colour: str, x: float) -> world.Thing:
        return world.Thing(shape, colour, x, 0.5, 0.3)

    image = as_tensor([world.render(world.Scene((thing("square", "red", 0.25), thing("circle", "blue", 0.75))), 32)])
    prompts = ["a red square left of a blue circle", "a red square right of a blue circle", "two red squares"]
    scores = PocketJudge()(image.expand(3, -1, -1, -1), prompts)
    assert scores.tolist() == pytest.approx([1, 2 / 3, 1 / 2])
    assert PocketJudge(graded=False)(image.expand(3, -1, -1, -1), prompts).tolist() == [1, 0, 0]


def test_the_judge_says_what_it_cannot_read_and_needs_prompts():
    images, _ = pictures(2)
    with pytest.raises(ValueError, match="the judge cannot read 'a photo of a cat'") as caught:
        scored(PocketJudge(), images, ["a photo of a cat", "a red square"])
    assert "raised by the reward pocket-judge for 2 rows" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match=r"pocket-judge compares pictures with their prompts, but row 1 has .* None"):
        PocketJudge()(images, ["a red square", None])


def test_the_judge_sees_how_things_move():
    rng = np.random.default_rng(0)
    scenes = [motion.sample_moving(rng) for _ in range(6)]
    clips = torch.stack([as_tensor(motion.render_moving(scene)) for scene in scenes])
    prompts = [motion.caption(scene) for scene in scenes]
    assert PocketJudge()(clips, prompts).tolist() == [1] * 6
    assert PocketJudge(graded=False)(clips, prompts).tolist() == [1] * 6
    backwards = PocketJudge()(clips.flip(1), prompts)
    expected = [0.5 + 0.5 * np.mean([move.direction == "still" for move in scene.motions]) for scene in scenes]
    assert backwards.tolist() == pytest.approx(expected)
    order = [3, 0, 5, 2, 1, 4]
    assert torch.equal(PocketJudge()(clips[order], [prompts[0]] * 6), PocketJudge()(clips, [prompts[0]] * 6)[order])
