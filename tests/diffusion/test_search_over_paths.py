"""Search over paths, and plain sampling, by the same pieces, are the released ones."""

import pytest
import torch

from diffusion.paths import Linear
from diffusion.sampler import times_of
from diffusion.search_over_paths import SearchOverPaths, survivors
from diffusion.steps import ode
from tests.diffusion.gaussian import DiffusionHost, GaussianHost, diffusion_grid, linear_grid
from tests.diffusion.searching import finished, replayed
from tests.vision_tokens.golden import load


def golden_host(golden, candidates, steps=10):
    target, mean, std = golden["target_mean_std"].tolist()[:3]
    return GaussianHost(
        linear_grid(steps),
        mean=mean,
        std=std,
        target=target,
        initials=golden["init_noise"],
        draws=lambda key: golden["noises"][key[0], key[1] * candidates + key[2]],
    )


@pytest.mark.parametrize("rows_per_call", [None, 2])
def test_the_run_is_the_released_one(rows_per_call):
    golden, _ = load("rbf/sop")
    chains, candidates, steps = golden["config"].tolist()
    forward, backward, start = (round(value, 6) for value in golden["times"].tolist())
    host = golden_host(golden, candidates)
    search = SearchOverPaths(None, chains, candidates, forward, backward, start, steps, "per chain")
    finalists = finished(search, host.problem(rows_per_call=rows_per_call))
    assert host.rows == int(golden["model_nfe"]) == chains * steps * (1 + candidates * search.rounds)
    assert host.scored == chains * candidates * search.rounds
    assert torch.allclose(finalists.latents[:1], golden["final_x0"], atol=1e-5)
    rewards = golden["rewards"].reshape(search.rounds, chains, candidates)
    for trail in finalists.trails:
        chosen = [move.noise for move in trail.moves if move.noise is not None]
        assert chosen == [
            (number, trail.chain, int(rewards[number, trail.chain].argmax())) for number in range(search.rounds)
        ]
    best = rewards[-1].max(dim=1).values.sort(descending=True).values
    assert torch.allclose(finalists.reward.float(), best, atol=1e-5)


def test_best_of_n_by_hand_is_the_released_one():
    golden, _ = load("rbf/bon_linear_ode")
    chains, _, steps, _ = golden["config"].tolist()
    host = golden_host(golden, 1, steps)
    problem, times = host.problem(), times_of("sqrt", Linear(), linear_grid(steps))
    assert torch.allclose(times[:-1].float(), golden["times"], atol=1e-6)
    particles = problem.start(chains)
    for time, kept in zip(times[1:-1], golden["kept_latents"], strict=False):
        particles = problem.propose(particles, ode(Linear().level(time)), at=0)
        assert torch.allclose(particles.latents, kept, atol=1e-5)
    scored = problem.scored(particles)
    assert torch.allclose(scored.reward.float(), golden["rewards"], atol=1e-5)
    assert torch.allclose(problem.finished(scored.best(1)).latents, golden["final_x0"], atol=1e-5)
    assert host.rows == int(golden["model_nfe"])


def test_survivors_are_the_best_of_all_or_of_each_chain():
    rewards = torch.tensor([3.0, 5.0, 4.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    assert survivors(rewards, 2, "best of all").tolist() == [1, 2]
    assert survivors(rewards, 2, "per chain").tolist() == [1, 4]


@pytest.mark.parametrize("keep", ["best of all", "per chain"])
@pytest.mark.parametrize(
    "host", [GaussianHost(linear_grid(6)), DiffusionHost(diffusion_grid(6))], ids=["flow", "diffusion"]
)
def test_finalists_are_clean_paid_for_and_made_again_from_their_trails(host, keep):
    search = SearchOverPaths(None, 2, 3, ode_steps=3, keep=keep)
    host.rows = 0
    problem = host.problem()
    finalists = finished(search, problem)
    assert host.rows == problem.ledger.spent["denoiser_rows"] == 2 * 3 * (1 + 3 * 4)
    assert torch.allclose(replayed(host, finalists.trails), finalists.latents, atol=1e-5)


def test_more_candidates_find_more():
    def reward(candidates):
        search = SearchOverPaths(None, 1, candidates, ode_steps=3)
        hosts = [GaussianHost(seed=seed) for seed in range(8)]
        return sum(float(finished(search, host.problem()).reward[0]) for host in hosts) / len(hosts)

    assert reward(1) < reward(8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chains": 0}, "chains is at least 1; got 0"),
        ({"candidates": 0}, "candidates, the noisy copies of each chain, is at least 1; got 0"),
        ({"ode_steps": 0}, "ode_steps of each run down is at least 1; got 0"),
        ({"start": 0.0}, "start, .* lies between 0 and 1; got 0.0"),
        ({"forward": 0.9, "backward": 0.8}, "backward above forward, or the samples never get clean"),
        ({"start": 0.5}, r"start \+ forward, the noisiest time, is at most 1; got \(0.5, 0.78\)"),
        ({"keep": "all"}, 'keep is "best of all" or "per chain"; got \'all\''),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        SearchOverPaths(None, **settings)
