"""What a reward is: by name, by reference, as plain data."""

import copy
import functools
import pickle
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
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
    get_reward,
    list_rewards,
    plain,
    reward_from_dict,
)
from tests.diffusion.reward_inputs import mean_red

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
