"""Best-of-N gains what order statistics say, and pays for what it samples."""

import pytest
import torch

from diffusion.best_of_n import BestOfN
from diffusion.rewards import Brightness
from tests.diffusion.gaussian import GaussianHost, linear_grid
from tests.diffusion.searching import finished


def first_entry(clean):
    return clean.flatten(1)[:, 0]


@pytest.mark.parametrize(("n", "expected"), [(2, 0.564), (4, 1.029), (8, 1.424)])
def test_the_gain_of_a_linear_reward_is_the_expected_maximum_of_n_normals(n, expected):
    runs = 400
    hosts = [
        GaussianHost(linear_grid(2), shape=(1, 1), mean=0.0, std=1.0, reward=first_entry, seed=seed)
        for seed in range(runs)
    ]
    scale = float(hosts[0].sample(torch.ones(1, 1, 1), [0]))  # sampling is linear
    best = torch.tensor([finished(BestOfN(None, n), host.problem()).reward[0] for host in hosts])
    assert float(best.mean()) / scale == pytest.approx(expected, abs=3 / runs**0.5)


def test_finalists_are_all_samples_best_first_and_the_first_chain_is_the_plain_sample():
    host = GaussianHost()
    finalists = finished(BestOfN(None, 5), host.problem())
    assert (finalists.reward.diff() <= 0).all()
    assert {trail.chain for trail in finalists.trails} == set(range(5))
    assert all(trail.sampled and not trail.moves for trail in finalists.trails)
    plain = [trail.chain for trail in finalists.trails].index(0)
    assert torch.allclose(finalists.latents[plain], host.sample(host.initial(0), [0])[0], atol=1e-6)


def test_equal_rewards_keep_the_earlier_sample():
    finalists = finished(BestOfN(None, 4), GaussianHost(reward=lambda clean: torch.zeros(len(clean))).problem())
    assert [trail.chain for trail in finalists.trails] == [0, 1, 2, 3]


def test_a_reward_that_is_no_number_loses():
    def broken(clean):
        return torch.tensor([torch.nan, 1.0, torch.inf])

    finalists = finished(BestOfN(None, 3), GaussianHost(reward=broken).problem())
    assert finalists.trails[0].chain == 1


@pytest.mark.parametrize("rows_per_call", [1, 2, 3])
def test_rows_grouped_differently_give_the_same_choice(rows_per_call):
    whole = finished(BestOfN(None, 5), GaussianHost().problem())
    parts = finished(BestOfN(None, 5), GaussianHost().problem(rows_per_call=rows_per_call))
    assert parts.trails == whole.trails
    assert torch.allclose(parts.latents, whole.latents, atol=1e-5)


def test_the_ledger_equals_what_the_denoiser_and_the_reward_saw():
    host = GaussianHost(guidance=(2.0, 0.0))
    problem = host.problem()
    finished(BestOfN(None, 5), problem)
    assert problem.ledger.spent == {"denoiser_rows": host.rows, "reward_calls": host.scored}
    assert (host.rows, host.scored) == (5 * 10 * 2, 5)


def test_one_sample_leaves_nothing_to_choose():
    assert not BestOfN(None, 1).chooses
    assert BestOfN(None, 2).chooses


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match=r"n, the number of samples, is at least 1; got 0. For no search .* pass n=1"):
        BestOfN(None, 0)


def test_settings_survive_being_written_down():
    method = BestOfN(Brightness(), 7, rows_per_call=2)
    assert BestOfN.from_dict(method.to_dict()) == method
