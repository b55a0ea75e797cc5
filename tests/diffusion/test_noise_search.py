"""Noise searches reproduce the released code's neighbours and decisions, keep within budget and lose no sample."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.noise_search import RandomSearch, ZeroOrderSearch, neighbour
from diffusion.rewards import Brightness
from tests.diffusion.gaussian import GaussianHost
from tests.diffusion.searching import finished
from tests.vision_tokens.golden import load


@pytest.mark.parametrize("name", ["packed", "unpacked", "video"])
def test_neighbours_are_the_released_code_s(name):
    golden, _ = load("noise_search/neighbours")
    pivot, gaussian, expected = (golden[f"{name}.{part}"] for part in ("pivot", "gaussian", "neighbours"))
    copies = pivot.repeat_interleave(expected.shape[1], dim=0)
    ours = neighbour(copies, gaussian.reshape(copies.shape), float(golden[f"{name}.cosine"]))
    assert (ours - expected.flatten(0, 1)).abs().max() < 1e-6


@given(st.floats(0, 1), st.integers(0, 2**31), st.sampled_from([(3,), (4, 3, 3), (2, 5, 3, 2)]), st.floats(0.01, 20))
def test_a_neighbour_has_the_pivot_s_norm_and_the_cosine_asked_for(cosine, seed, shape, scale):
    generator = torch.Generator().manual_seed(seed)
    pivot, gaussian = (torch.randn(2, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    near = neighbour(pivot * scale, gaussian, cosine)
    u, n = (pivot * scale).flatten(1), near.flatten(1)
    assert torch.allclose(n.norm(dim=1) / u.norm(dim=1), torch.ones(2).double(), atol=1e-6)
    assert (torch.cosine_similarity(u, n) - cosine).abs().max() < 1e-6


def test_cosine_one_is_the_pivot_and_low_precision_keeps_the_cosine():
    generator = torch.Generator().manual_seed(0)
    pivot, gaussian = torch.randn(2, 1, 16, 8, 8, generator=generator)
    assert torch.allclose(neighbour(pivot, gaussian, 1.0), pivot, atol=1e-6)
    near = neighbour(pivot.bfloat16(), gaussian.bfloat16(), 0.95)
    assert near.dtype == torch.bfloat16
    assert torch.cosine_similarity(pivot.flatten(), near.float().flatten(), dim=0) == pytest.approx(0.95, abs=1e-4)


class TanhHost(GaussianHost):
    """Samples by tanh, at the price of the Gaussian's steps; remembers the noises that it was given."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.noises = []

    def sample(self, latents, chains):
        self.noises.append(latents)
        return latents.tanh()


@pytest.mark.parametrize("name", ["zero_order_a", "zero_order_b"])
def test_zero_order_search_decides_as_the_released_code(name):
    golden, _ = load(f"noise_search/{name}")
    rounds, neighbours = golden["config"].tolist()
    cosine, target = golden["cosine_target"].tolist()
    expected, fresh = golden["pivot_and_neighbours"], golden["fresh_pivot_rounds"].tolist()
    host = TanhHost(
        shape=(2, 2, 3),
        target=target,
        initials=torch.cat([expected[fresh, 0], torch.zeros(1, 2, 2, 3)]),  # a last restart may never be sampled
        draws=lambda key: golden["gaussians"][-1 - key[0], 0, key[2]],
    )
    problem = host.problem()
    rewards = []
    score = problem.score
    problem.score = lambda latents, trails: rewards.append(score(latents, trails)) or rewards[-1]
    finalists = finished(ZeroOrderSearch(None, neighbours, rounds, cosine), problem)
    for number in range(rounds):
        sampled = expected[number] if number in fresh else expected[number, 1:]
        assert (host.noises[number] - sampled).abs().max() < 1e-6
        assert (rewards[number] - golden["scores"][number, -len(sampled) :]).abs().max() < 1e-6
    assert float(finalists.reward[0]) == pytest.approx(float(golden["scores"].max()), abs=1e-6)
    assert problem.ledger.spent["denoiser_rows"] == (len(fresh) + rounds * neighbours) * problem.steps


def retold(host, trail):
    """The sample that a trail describes, from seeds alone."""
    noise = host.initial(trail.chain)
    for cosine, key in trail.turns:
        noise = neighbour(noise, host.draw(key), cosine)
    return host.sample(noise, [trail.chain])[0]


SEARCHES = [
    RandomSearch(None, 3),
    ZeroOrderSearch(None, 3, 6),
    ZeroOrderSearch(None, 2, 6, 0.8, "stay"),
    ZeroOrderSearch(None, 1, 8, 0.8, "shrink"),
]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
class TestEverySearch:
    def test_settings_survive_being_written_down(self, search):
        written = replace(search, reward=Brightness(), nfe=70)
        assert type(search).from_dict(written.to_dict()) == written

    def test_finalists_come_best_first_hold_the_best_ever_seen_and_can_be_retold(self, search):
        host = GaussianHost(std=1.0)
        problem = host.problem()
        finalists = finished(search, problem)
        assert (finalists.reward.diff() <= 0).all()
        assert float(finalists.reward[0]) == problem.best_reward
        assert torch.equal(finalists.latents[:1], problem.best_latents)
        for latents, trail in zip(finalists.latents, finalists.trails, strict=True):
            assert trail.sampled
            assert torch.allclose(retold(host, trail), latents, atol=1e-6)

    def test_the_same_seed_gives_the_same_result_however_rows_are_grouped(self, search):
        whole = finished(search, GaussianHost(seed=3).problem())
        for rows_per_call in (1, 2, 5):
            parts = finished(search, GaussianHost(seed=3).problem(rows_per_call=rows_per_call))
            assert parts.trails == whole.trails
            assert torch.allclose(parts.latents, whole.latents, atol=1e-5)
        assert finished(search, GaussianHost(seed=4).problem()).trails != whole.trails or search.name == "random-search"

    def test_the_ledger_equals_what_the_denoiser_and_the_reward_saw(self, search):
        host = GaussianHost(guidance=(2.0, 0.0))
        problem = host.problem()
        finished(search, problem)
        assert problem.ledger.spent == {"denoiser_rows": host.rows, "reward_calls": host.scored}

    @pytest.mark.parametrize("nfe", [40, 55, 60, 119, 200, 3000])
    def test_a_budget_is_never_overrun_and_cuts_the_last_round_short(self, search, nfe):
        limited = replace(search, nfe=nfe)
        assert limited.limit == nfe
        host = GaussianHost(guidance=(2.0, 0.0))
        problem = host.problem(nfe)
        finished_early = list(limited.search(problem))
        assert host.rows <= nfe
        assert finished_early == sorted(finished_early)
        if nfe < 3000:
            assert nfe - host.rows < 40  # at most a pivot that would have had no neighbour is left

    def test_a_budget_too_small_names_the_smallest_that_works(self, search):
        least = 1 if search.name == "random-search" else 2
        with pytest.raises(
            ValueError,
            match=rf"nfe={10 * least - 2} has room for .* needs at least {least}: give it "
            rf"nfe={10 * least} or more",
        ):
            list(replace(search, nfe=10 * least - 2).search(GaussianHost().problem(10 * least - 2)))
        list(replace(search, nfe=10 * least).search(GaussianHost().problem(10 * least)))

    def test_a_reward_that_is_never_a_number_gives_the_first_sample(self, search):
        host = GaussianHost(reward=lambda clean: torch.full((len(clean),), torch.nan))
        assert finished(search, host.problem()).trails[0] == finished(RandomSearch(None, 1), host.problem()).trails[0]


def test_random_search_doubles_its_rounds_and_is_best_of_n_over_all_of_them():
    host = GaussianHost()
    problem = host.problem()
    finalists = finished(RandomSearch(None, 4), problem)
    assert host.scored == 2 + 4 + 8 + 16
    samples = problem.sample(problem.start(30))
    best = problem.scored(samples, samples.latents).best()
    assert finalists.trails[0] == best.trails[0]
    assert len(finalists) == 4


def test_staying_costs_one_row_of_steps_for_the_pivot_and_never_gets_worse():
    host = GaussianHost()
    problem = host.problem()
    finalists = finished(ZeroOrderSearch(None, 4, 5, 0.9, "stay"), problem)
    assert host.rows == (1 + 5 * 4) * problem.steps
    rewards = [reward for _, reward in problem.trace]
    assert rewards == sorted(rewards)
    assert finalists.ancestors() == 1


def test_shrinking_halves_the_angle_after_a_failure():
    host = GaussianHost(reward=lambda clean: torch.arange(len(clean), 0, -1) - 10.0 * host.scored)
    problem = host.problem()
    keys = []
    draw, host.draw = host.draw, lambda key: keys.append(key) or draw(key)
    noises = []
    sample, host.sample = host.sample, lambda latents, chains: noises.append(latents) or sample(latents, chains)
    finished(ZeroOrderSearch(None, 1, 3, 0.5, "shrink"), problem)
    pivot = noises[0][:1].flatten(1)
    angles = [math.acos(float(torch.cosine_similarity(pivot, noise[-1:].flatten(1)))) for noise in noises]
    assert angles == pytest.approx([math.acos(0.5) / 2**number for number in range(3)], abs=1e-4)
    assert len(set(keys)) == 3 and all(step < 0 for step, _, _ in keys)


def test_a_smooth_reward_is_climbed_further_by_neighbours_than_by_fresh_noises():
    """32 dimensions, 41 samples each: the walk has something to follow."""
    gains = []
    for seed in range(8):
        settings = {"shape": (32,), "std": 1.0, "mean": 0.0, "seed": seed, "reward": lambda clean: clean.mean(dim=1)}
        walk = finished(ZeroOrderSearch(None, 4, 10, 0.8, "stay"), GaussianHost(**settings).problem())
        fresh = finished(RandomSearch(None, 4), GaussianHost(**settings).problem())
        gains.append(float(walk.reward[0] - fresh.reward[0]))
    assert sum(gains) > 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandomSearch(None, 0), r"rounds is at least 1, which samples 2 noises; got 0"),
        (lambda: RandomSearch(None, nfe=0), r"nfe, the most denoiser rows to spend, is at least 1; got 0. .*pass None"),
        (lambda: ZeroOrderSearch(None, 0), r"neighbours and rounds are at least 1; got neighbours=0, rounds=4"),
        (lambda: ZeroOrderSearch(None, cosine=1.0), r"lies in \[0, 1\); got 1.0. At 1 a neighbour is its pivot"),
        (lambda: ZeroOrderSearch(None, on_failure="give up"), r'"restart", "stay" or "shrink"; got \'give up\''),
    ],
)
def test_settings_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
