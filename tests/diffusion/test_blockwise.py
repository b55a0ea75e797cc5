"""SVDD and CoDe are the released ones, and draw as they say."""

import pytest
import torch

from diffusion.blockwise import CoDe, blocks
from diffusion.svdd import SVDD
from mmaccel.methods import Unsupported
from tests.diffusion.gaussian import GaussianHost, linear_grid
from tests.diffusion.searching import PAPER, finished, replayed
from tests.vision_tokens.golden import load


def kept_latents(host, trails, count):
    """The noisy latents that each trail led to after `count` moves, whose noise is known."""
    return replayed(host, tuple(type(trail)(trail.chain, trail.moves[:count], start=trail.start) for trail in trails))


@pytest.mark.parametrize("name", ["svdd_vp_sde", "svdd_linear_sde", "code_vp_sde"])
@pytest.mark.parametrize("rows_per_call", [None, 3])
def test_runs_are_the_released_ones(name, rows_per_call):
    golden, _ = load(f"rbf/{name}")
    chains, candidates, steps, block = golden["config"].tolist()
    target, mean, std, _ = golden["target_mean_std"].tolist()
    host = GaussianHost(
        linear_grid(steps),
        mean=mean,
        std=std,
        target=target,
        initials=golden["init_noise"],
        draws=lambda key: golden["noises"][key[0], key[1] * candidates + key[2]],
    )
    path = name.split("_")[1]
    if name.startswith("code"):
        search = CoDe(None, chains, candidates, block, path=path, **PAPER)
    else:
        search = SVDD(None, chains, candidates, path=path, **PAPER)
    finalists = finished(search, host.problem(rows_per_call=rows_per_call))
    rows, scored = host.rows, host.scored
    assert torch.allclose(finalists.latents[:1], golden["final_x0"], atol=1e-5)

    # which candidates went on: the noise that each move used, and where it led
    rewards = golden["rewards"].reshape(-1, chains, candidates)
    for trail in finalists.trails:
        for step, move in enumerate(trail.moves[:-1]):
            assert move.noise == (step, trail.chain, int(rewards[step // block, trail.chain].argmax()))
        for number, kept in enumerate(golden["kept_latents"][: (steps - 1) // block]):
            ours = kept_latents(host, (trail,), (number + 1) * block)
            assert torch.allclose(ours, kept[trail.chain : trail.chain + 1], atol=1e-5)
    last = rewards[-1].reshape(chains, candidates).max(dim=1).values.sort(descending=True).values
    assert torch.allclose(finalists.reward.float(), last, atol=1e-5)

    # the released code evaluates the first, shared level once for each candidate
    assert rows == chains + chains * candidates * (steps - 1) == int(golden["model_nfe"]) - chains * (candidates - 1)
    assert scored == chains * candidates * len(blocks(steps, block))


@pytest.mark.parametrize(("steps", "block"), [(6, 1), (6, 2), (7, 2), (5, 10), (2, 1)])
def test_blocks_take_every_step_but_the_last_in_order(steps, block):
    parts = blocks(steps, block)
    assert [number for part in parts for number in part] == list(range(steps - 1))
    assert all(len(part) == block for part in parts[:-1])


@pytest.mark.parametrize("search", [SVDD(None, 2, 3), CoDe(None, 2, 3), SVDD(None, 2, 3, temperature=0.1)])
@pytest.mark.parametrize("rows_per_call", [1, 4])
def test_grouping_rows_differently_changes_nothing(search, rows_per_call):
    host = GaussianHost(linear_grid(5))
    whole, parts = (finished(search, host.problem(rows_per_call=rows)) for rows in (None, rows_per_call))
    assert parts.trails == whole.trails
    assert torch.allclose(parts.latents, whole.latents, atol=1e-5)
    assert torch.allclose(replayed(host, whole.trails), whole.latents, atol=1e-5)


def test_chains_do_not_depend_on_each_other():
    one, two = (finished(SVDD(None, chains, 3), GaussianHost().problem()) for chains in (1, 2))
    first = [trail.chain for trail in two.trails].index(0)
    assert torch.allclose(one.latents[0], two.latents[first], atol=1e-6)


def test_a_high_temperature_takes_no_heed_of_the_reward_and_a_low_one_is_greedy():
    def reward(temperature):
        search = SVDD(None, 1, 4, temperature, path="pipeline", eta=1.0)
        hosts = [GaussianHost(linear_grid(4), seed=seed) for seed in range(12)]
        return sum(float(finished(search, host.problem()).reward[0]) for host in hosts) / len(hosts)

    greedy, cold, warm = reward(0.0), reward(1e-6), reward(1e6)
    assert cold == pytest.approx(greedy) and warm < greedy - 0.1


def test_without_noise_there_is_nothing_to_choose():
    with pytest.raises(Unsupported, match=r"svdd chooses between noisy steps, .*'pipeline'.* pass eta=1.0"):
        finished(SVDD(None, path="pipeline"), GaussianHost(eta=0.0).problem())
    with pytest.raises(Unsupported, match=r"code chooses between noisy steps, .* give norm a value above 0"):
        finished(CoDe(None, norm=0.0), GaussianHost().problem())


@pytest.mark.parametrize(
    ("search", "settings", "message"),
    [
        (SVDD, {"chains": 0}, "chains is at least 1; got 0"),
        (SVDD, {"candidates": 0}, "candidates, the continuations of each chain, is at least 1; got 0"),
        (SVDD, {"temperature": -1.0}, "temperature is at least 0"),
        (CoDe, {"chains": 0}, "chains is at least 1; got 0"),
        (CoDe, {"candidates": 0}, "candidates, the continuations of each chain, is at least 1; got 0"),
        (CoDe, {"block": 0}, "block, the steps between two choices, is at least 1; got 0"),
    ],
)
def test_settings_are_checked(search, settings, message):
    with pytest.raises(ValueError, match=message):
        search(None, **settings)
