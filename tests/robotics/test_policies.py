"""One protocol for every policy: what it promises, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mmaccel import Unsupported
from robotics import ActionBins, ActionTokenPolicy, LerobotPolicy, Observation, PI0Policy, Quantiles
from robotics.policies import cameras_of
from tests.robotics.tiny import (
    CAMERAS,
    DIMS,
    HORIZON,
    PATCHES,
    POLICIES,
    Lerobot,
    lerobot_policy,
    llava_inputs,
    observation,
    pi0_policy,
    token_policy,
)


@pytest.fixture(params=POLICIES)
def policy(request):
    made = POLICIES[request.param]()
    made.reset()
    return made


def test_a_chunk_has_an_action_of_every_row_and_step(policy):
    chunk = policy.act(policy.observe(observation(3)), torch.Generator().manual_seed(0))
    assert chunk.actions.shape == (3, policy.horizon, DIMS)
    assert chunk.execute.tolist() == [policy.execute] * 3


def test_the_same_seed_gives_the_same_chunk(policy):
    inputs = policy.observe(observation())
    first, second = (policy.act(inputs, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.actions, second.actions)


def test_several_samples_are_the_chunks_of_their_noises(policy):
    inputs = policy.observe(observation())
    if not policy.stochastic:
        with pytest.raises(ValueError, match="ActionTokenPolicy draws no noise, so all its samples would be the same"):
            policy.sample(inputs, 3)
        return
    noise = policy.draw(inputs, 3, torch.Generator().manual_seed(1))
    together = policy.sample(inputs, 3, noise=noise)
    for number in range(3):
        torch.testing.assert_close(together[:, number], policy.act(inputs, noise=noise[:, number]).actions)
    assert not torch.allclose(together[:, 0], together[:, 1])


def test_rows_do_not_see_each_other():
    for policy in (token_policy(), pi0_policy()):
        policy.reset()
        inputs = policy.observe(observation(3))
        noise = policy.draw(inputs, 1, torch.Generator().manual_seed(2))
        whole = policy.act(inputs, noise=None if noise is None else noise[:, 0]).actions
        for row in range(3):
            own = policy.observe(observation(3).only([row]))
            alone = policy.act(own, noise=None if noise is None else noise[row : row + 1, 0]).actions
            torch.testing.assert_close(alone[0], whole[row], rtol=1e-5, atol=1e-5)


def test_visual_and_action_tokens_sit_where_they_are_said_to():
    policy = token_policy()
    policy.reset()
    places = policy.places(policy.observe(observation(1)))
    assert places.camera[0, :4].tolist() == [-1, 0, 0, 0]
    assert [(places.camera[0] == camera).sum() for camera in (0, 1)] == [PATCHES, PATCHES]
    assert (places.actions, places.action_tokens, places.between) == ("decoded", DIMS, 0)
    policy = pi0_policy()
    policy.reset()
    padded = {"top": torch.tensor([False, True])}
    places = policy.places(policy.observe(observation(2, padded=padded)))
    assert places.camera[0, [0, PATCHES - 1, PATCHES, 2 * PATCHES]].tolist() == [0, 0, 1, -1]
    assert places.camera[1, [0, PATCHES - 1, PATCHES]].tolist() == [1, 1, -1]
    assert (places.actions, places.action_tokens, places.between) == ("suffix", HORIZON, 1)


def test_cameras_without_a_word_of_the_policy_are_tokens_that_stand_together():
    visual = torch.tensor([[0, 1, 1, 0, 1, 0]]).bool()
    assert cameras_of(visual).tolist() == [[-1, 0, 0, -1, 1, -1]]
    with pytest.raises(ValueError, match=r"\[2\] cameras with \[3\] visual tokens in all, which are no equal parts"):
        cameras_of(visual, torch.ones(1, 2, dtype=torch.bool))


def test_action_tokens_are_bins_and_back():
    bins = ActionBins(vocabulary=32000)
    tokens = torch.arange(31745, 32000)
    assert torch.equal(bins.tokens(bins.centres(tokens)), tokens)
    assert bins.centres(torch.tensor([31999, 5])).tolist() == pytest.approx([-1 + 1 / 255, 1 - 1 / 255])
    assert bins.tokens(torch.tensor([-9.0, 9.0])).tolist() == [31999, 31745]


def test_quantiles_give_the_robot_s_units_where_the_mask_says():
    units = Quantiles(torch.tensor([0.0, 0.0]), torch.tensor([4.0, 4.0]), torch.tensor([True, False]))
    assert units(torch.tensor([[-1.0, 0.5], [1.0, 0.25]])).tolist() == [[0.0, 0.5], [4.0, 0.25]]


# What is refused


def refused(policy, match, error=ValueError, **given):
    with pytest.raises(error, match=match):
        policy.observe(observation(**given))


def test_an_episode_that_was_not_begun():
    for make in POLICIES.values():
        refused(make(), r"no episode was begun: call policy.reset\(\) before the first observation", RuntimeError)


def test_a_batch_that_changes_its_size_between_resets(policy):
    policy.observe(observation(2))
    refused(policy, "began with 2 rows, and this observation has 3; name them", rows=3)
    with pytest.raises(ValueError, match="got an observation of row 7"):
        policy.observe(replace(observation(1), rows=[7]))
    with pytest.raises(ValueError, match=r"there are rows 0..1; got row 2 to reset"):
        policy.reset([2])
    policy.reset()
    policy.observe(observation(3))


def test_cameras_that_are_missing_or_padded():
    policy = token_policy()
    policy.reset()
    refused(policy, r"reads the cameras top, wrist, and the observation lacks 'wrist' \(it has top\); pass it",
            cameras=("top",))  # fmt: skip
    refused(policy, "no way to go without a camera, and the observation has padded ones; show it all of top, wrist",
            padded={"top": torch.tensor([True, False])})  # fmt: skip
    policy = pi0_policy()
    policy.reset()
    refused(policy, "lacks 'wrist'.*pass zeros and name it in padded", cameras=("top",))
    refused(policy, "padded names 'left', which is none of the cameras", padded={"left": torch.tensor([True, False])})
    nothing = {name: torch.tensor([False, True]) for name in CAMERAS}
    refused(policy, "every camera of a row is padded, so there is nothing to act on", padded=nothing)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(policy, value):
    seen = observation()
    seen.state[1, 2] = value
    with pytest.raises(ValueError, match=r"the state holds NaN or infinite numbers in row 1.*mend the reading"):
        policy.observe(seen)
    seen = observation()
    seen.images["wrist"][0, 0, 3, 3] = value
    with pytest.raises(ValueError, match="the camera 'wrist' holds NaN or infinite numbers in row 0"):
        policy.observe(seen)


def test_pictures_of_bytes_and_parts_of_other_lengths(policy):
    seen = observation()
    pictures = {name: (own * 255).byte() for name, own in seen.images.items()}
    with pytest.raises(ValueError, match=r"camera 'top' holds torch.uint8; pass floats.*divide bytes by 255"):
        policy.observe(Observation(pictures, seen.state, seen.instruction))
    with pytest.raises(ValueError, match=r"pictures are \[rows, 3, height, width\]; camera 'top' has \[2, 48, 48\]"):
        policy.observe(Observation({name: own[:, 0] for name, own in seen.images.items()}))
    with pytest.raises(ValueError, match=r"one entry a row; got 2 of camera 'top', 2 of camera 'wrist', 1 of state"):
        policy.observe(Observation(seen.images, seen.state[:1], seen.instruction))


def test_models_that_are_no_such_policy():
    with pytest.raises(Unsupported, match="decoded with generate, which Linear has not"):
        ActionTokenPolicy(nn.Linear(1, 1), llava_inputs, cameras=CAMERAS, dims=3, bins=ActionBins(98))
    with pytest.raises(Unsupported, match=r"PI0Policy takes transformers' PI0ForConditionalGeneration; got Linear"):
        PI0Policy(nn.Linear(1, 1), llava_inputs, cameras=CAMERAS, dims=3)
    with pytest.raises(Unsupported, match=r"Linear lacks reset, predict_action_chunk, config.chunk_size"):
        LerobotPolicy(nn.Linear(1, 1), cameras=CAMERAS, dims=3)


def test_lerobot_policies_are_reset_and_their_batches_are_their_own():
    policy = lerobot_policy()
    policy.reset()
    policy.reset([1])
    assert policy.model.resets == 1
    inputs = policy.observe(observation())
    policy.act(inputs)
    assert inputs.model["observation.state"] is not None
    with pytest.raises(Unsupported, match="where the tokens of a lerobot Lerobot sit is not known"):
        policy.places(inputs)
    with pytest.raises(Unsupported, match="a LerobotPolicy was not trained with several horizons"):
        policy.by_horizon(inputs)
    remembering = Lerobot()
    remembering.config = type("Config", (), {"chunk_size": 6, "n_action_steps": 4, "n_obs_steps": 2})
    policy = LerobotPolicy(remembering, cameras=CAMERAS, dims=3)
    with pytest.raises(Unsupported, match="remembers 2 observations and forgets all rows at once"):
        policy.reset([0])
