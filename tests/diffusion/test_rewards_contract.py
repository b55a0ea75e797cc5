"""What a reward is: by name, by reference, as plain data; its input, and the rule for wrong output."""

import copy
import functools
import pickle
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from diffusion import rewards
from diffusion.rewards import (
    Calibrated,
    ClipScore,
    Colourfulness,
    JpegCompressibility,
    MotionMagnitude,
    PocketJudge,
    SubjectConsistency,
    as_reward,
    checked,
    get_reward,
    list_rewards,
    plain,
    reward_from_dict,
    scored,
)
from tests.diffusion.reward_inputs import mean_red, moving, pictures

HERE = "tests.diffusion.test_rewards_contract"


@dataclass(frozen=True, kw_only=True)
class Greenness(rewards.ImageReward):
    """How green a picture is."""

    name: ClassVar[str] = "greenness"

    gain: float = 1.0

    def score(self, images, prompts):
        return self.gain * images[:, 1].mean(dim=(-2, -1))


@dataclass(frozen=True)
class Search:
    """A method that holds a reward, as searches do."""

    reward: rewards.RewardField
    n: int = field(default=4, kw_only=True)


GREEN = Greenness(gain=2.0)
BUILT: list[rewards.Reward] = [
    ClipScore(model="some/folder"),
    PocketJudge(graded=False),
    JpegCompressibility(quality=50, incompressible=True),
    MotionMagnitude(log=True),
    SubjectConsistency(),
    rewards.Aesthetic(model="clip", head="head.safetensors"),
    rewards.VqaScore(model="llava", answer="square"),
    rewards.OpenClipScore(model="ViT-B-32", pretrained="openai"),
    Calibrated(rewards=[Colourfulness(), mean_red, {"reward": "brightness"}], weights=[0.5, 1, 0], correlation=0.4),
    Greenness(gain=3.0),
]


@pytest.mark.parametrize("reward", BUILT, ids=lambda reward: reward.name)
def test_a_reward_survives_its_dictionary_and_copies_and_pickles(reward):
    data = reward.to_dict()
    assert reward_from_dict(data) == reward and hash(reward_from_dict(data)) == hash(reward)
    assert copy.deepcopy(reward) == reward and pickle.loads(pickle.dumps(reward)) == reward
    adapter = TypeAdapter(Search)
    written = adapter.dump_json(Search(reward=reward))
    assert adapter.validate_json(written) == Search(reward=reward)


def test_the_dictionary_is_the_documented_one():
    assert ClipScore().to_dict() == {"reward": "clip-score", "model": "pocket-clip"}
    assert Greenness().to_dict() == {"reward": f"{HERE}:Greenness", "gain": 1.0}  # no entry point: by its class
    assert plain(mean_red) == "tests.diffusion.reward_inputs:mean_red"


def test_a_folder_given_as_a_path_is_written_as_text(tmp_path):
    reward = ClipScore(model=tmp_path)
    assert reward.to_dict()["model"] == str(tmp_path) and reward_from_dict(reward.to_dict()) == reward


@pytest.mark.parametrize("name", list_rewards())
def test_every_registered_reward_says_what_it_is(name):
    reward = get_reward(name)
    assert reward.name == name and reward.summary().endswith(".") and len(reward.__doc__.splitlines()) >= 1
    assert reward.json_schema()["additionalProperties"] is False


def test_all_fourteen_are_registered():
    assert set(list_rewards()) >= {
        "clip-score", "pocket-judge", "jpeg-compressibility", "brightness", "contrast", "colourfulness",
        "motion-magnitude", "motion-smoothness", "temporal-consistency", "subject-consistency", "aesthetic",
        "vqa-score", "open-clip-score", "calibrated",
    }  # fmt: skip


def test_public_names_are_all_there():
    for name in rewards.__all__:
        assert getattr(rewards, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'ClippScore'"):
        _ = rewards.ClippScore


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("clip-score", ClipScore()),
        ({"reward": "clip-score", "model": "x"}, ClipScore(model="x")),
        (ClipScore(), ClipScore()),
        (mean_red, mean_red),
        ("tests.diffusion.reward_inputs:mean_red", mean_red),
        (f"{HERE}:GREEN", GREEN),
        ({"reward": f"{HERE}:Greenness", "gain": 2.0}, GREEN),
    ],
)
def test_a_field_takes_names_dictionaries_objects_functions_and_references(given, expected):
    assert as_reward(given) == expected
    assert TypeAdapter(Search).validate_python({"reward": given}).reward == expected


def test_any_callable_works_in_a_search_built_directly():
    halves = functools.partial(torch.mul, 0.5)
    for reward in (lambda images, prompts: images.mean(), halves):
        assert as_reward(Search(reward=reward).reward) is reward


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("clip-scor", r"there is no reward 'clip-scor'; did you mean 'clip-score'\? known: aesthetic, brightness"),
        ("aesthetic", r"aesthetic needs its setting 'model', e.g. \{'reward': 'aesthetic', 'model': '...'\}"),
        ({"name": "clip-score"}, r'a reward is a mapping with a key "reward", e.g. .*got \{\'name\''),
        ({"reward": "clip-score", "modle": "x"}, r"clip-score has no setting 'modle'; did you mean 'model'\?"),
        ({"reward": "jpeg-compressibility", "quality": "good"}, r"jpeg-compressibility: quality: .*got 'good'$"),
        ({"reward": "jpeg-compressibility", "quality": 0}, r"jpeg-compressibility: the quality .* 1 to 95; got 0$"),
        (
            {"reward": "vqa-score", "model": "x", "rows_per_call": 0},
            r"rows_per_call is a whole number .* up; got 0",
        ),
        ({"reward": f"{HERE}:mean_red"}, r'the key "reward" names a class of rewards; .* is <function mean_red'),
        (
            "no_such_package.module:f",
            r"cannot be imported \(No module named 'no_such_package'\); a reference is pa",
        ),
        (f"{HERE}:no_such", r"does not exist: tests.diffusion.test_rewards_contract has no 'no_such'"),
        (ClipScore, r"a reward is an object, and ClipScore is a class; build one, with its settings: ClipScore\(\)"),
        (3, r"a reward is a Reward, a callable .* or a reference \(\"package.module:name\"\); got 3"),
    ],
)
def test_what_is_no_reward_is_refused_with_the_nearest_that_works(given, message):
    with pytest.raises(ValueError, match=message):
        as_reward(given)
    with pytest.raises(ValidationError, match=message.rstrip("$")):
        TypeAdapter(Search).validate_python({"reward": given})


class Holder:
    def reward(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


def local_reward():
    @dataclass(frozen=True, kw_only=True)
    class Local(Greenness):
        pass

    return Local()


def in_a_script(images, prompts):
    return images.mean(dim=(1, 2, 3))


in_a_script.__module__ = "__main__"


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            lambda images, prompts: images,
            r"the reward .*<lambda> can be used, but not written down. Define it as a f",
        ),
        (functools.partial(mean_red), r"the reward partial of .*mean_red can be used, but not .*imports it by a name"),
        (Holder().reward, r"Holder.reward can be used, but not written down"),
        (local_reward(), r"the reward greenness can be used.*its class is defined inside a function"),
        (in_a_script, r"the reward in_a_script can be used, but not written down"),
    ],
)
def test_what_cannot_be_found_again_is_not_written_down(reward, message):
    with pytest.raises(ValueError, match=message):
        plain(reward)
    with pytest.raises(ValueError, match=message):
        TypeAdapter(Search).dump_python(Search(reward=reward), mode="json")


def test_a_function_of_the_running_script_is_not_written_down(monkeypatch):
    monkeypatch.setattr("__main__.in_a_script", in_a_script, raising=False)
    with pytest.raises(ValueError, match="it belongs to the script that runs now"):
        plain(in_a_script)


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
