"""Latent beam search is the paper's, keeps what is best, and costs what it says."""

import itertools

import pytest
import torch

from diffusion.beam_search import LatentBeamSearch
from diffusion.lookahead import look_ahead, training_times
from diffusion.particles import Level
from diffusion.steps import ddim, ode
from mmaccel.methods import Unsupported
from tests.diffusion.gaussian import DiffusionHost, GaussianHost, cumulative_alphas, diffusion_grid, linear_grid
from tests.diffusion.searching import finished, replayed
from tests.vision_tokens.golden import load


def level_at(time, products):
    """The level at a training time; a negative one is clean."""
    product = products[time].double() if time >= 0 else torch.tensor(1.0, dtype=torch.float64)
    return Level(product.sqrt(), (1 - product).sqrt())


def estimates(golden, level, prediction):
    """(x0, eps) of a model's output, the sheet's section 3."""
    sample, output = golden["sample"], golden["model_output"]
    alpha, sigma = float(level.alpha), float(level.sigma)
    if prediction == 1:
        return alpha * sample - sigma * output, alpha * output + sigma * sample
    return (sample - sigma * output) / alpha, output


def test_steps_are_the_released_schedulers():
    golden, _ = load("dlbs/ddim_step")
    products = golden["alphas_cumprod"]
    names = sorted({key.split(".")[0] for key in golden if "." in key})
    for name in names:
        one = {key.split(".")[1]: value for key, value in golden.items() if key.startswith(name + ".")}
        prediction, steps, third, time = one["meta"].tolist()
        if name.startswith("jump"):
            now, to, eta = level_at(int(third), products), level_at(int(time), products), 0.0
        else:
            now, to, eta = level_at(int(time), products), level_at(int(time) - 1000 // int(steps), products), third
        x0, eps = estimates(one, now, prediction)
        p, q, s, _ = ddim(now, to, eta)
        assert torch.allclose(x0, one["pred_x0"], atol=1e-5, rtol=1e-5)
        moved = float(p) * x0 + float(q) * eps
        if name.startswith("jump"):
            assert torch.allclose(moved, one["prev_sample"], atol=1e-5, rtol=1e-5)
        else:
            assert torch.allclose(moved + float(s) * one["noise"], one["prev_sample"], atol=1e-5, rtol=1e-5)


def test_lookahead_times_are_the_released_ones():
    golden, _ = load("dlbs/lookahead_times")
    for steps, lookahead in itertools.product((10, 50), (1, 2, 3, 6)):
        times = golden[f"steps{steps}.timesteps"][1:].tolist()
        expected = golden[f"steps{steps}.lookahead{lookahead}"].tolist()
        for time, pairs in zip(times, expected, strict=True):
            unique = [tuple(pair) for pair in pairs if pair[0] > pair[1]]
            assert training_times(time, lookahead) == (unique or [(time, 0)])


@pytest.mark.parametrize(("now", "count"), [(0, 6), (2, 6), (5, 1), (999, 7)])
def test_lookahead_steps_join_up_and_end_at_zero(now, count):
    pairs = training_times(now, count)
    assert pairs[0][0] == now and pairs[-1][1] == 0 and len(pairs) <= count
    assert all(before[1] == after[0] for before, after in itertools.pairwise(pairs))


class Recorded(LatentBeamSearch):
    """Writes down every sorting of candidates."""

    def judged(self, problem, successors):
        scored = super().judged(problem, successors)
        self.__dict__.setdefault("judgements", []).append(scored)
        return scored


@pytest.mark.parametrize("name", ["dlbs_b2k3_l1", "dlbs_b3k2_l3", "greedy_b1k4_l2_cfg"])
@pytest.mark.parametrize("reuse", [True, False])
def test_runs_are_the_released_ones(name, reuse):
    golden, _ = load(f"dlbs/{name}")
    beams, candidates, lookahead, steps = golden["config"].tolist()
    eta, guidance, target, mean, std = golden["eta_guidance_target_mu_sd"].tolist()
    host = DiffusionHost(
        diffusion_grid(steps),
        mean=2 * mean,
        std=std,
        target=target,
        shape=golden["init_noise"].shape[1:],
        guidance=(guidance, 0.5 * mean) if guidance > 1 else None,
        initials=golden["init_noise"],
        draws=lambda key: golden["noises"][(key[0] * beams + key[1]) * candidates + key[2]],
    )
    search = Recorded(None, beams, candidates, lookahead, eta, reuse=reuse)
    finalists = finished(search, host.problem())

    rewards, orders = golden["rewards"].reshape(steps, -1).double(), golden["sorted_indices"]
    for step, judged in enumerate(search.judgements):
        assert torch.allclose(judged.reward, rewards[step], atol=1e-5)
        assert judged.reward.argsort(descending=True, stable=True).tolist() == orders[step].tolist()
    last = rewards[-1].reshape(beams, candidates)
    assert torch.allclose(finalists.reward, last[:, 0].sort(descending=True).values, atol=1e-5)
    assert torch.allclose(finalists.latents[:1], golden["final_latents"], atol=1e-5)

    cost = 1 if guidance <= 1 else 2
    assert cost * beams * (steps + (steps - 1) * candidates * lookahead) == int(golden["model_rows"])
    looks = [len(training_times(time, lookahead)) for time in golden["timesteps"][1:].tolist()]  # 1 at time 0, not L
    assert host.rows == cost * beams * ((1 if reuse else steps) + candidates * sum(looks))


@pytest.mark.parametrize(("beams", "candidates", "lookahead", "nfe"), [(4, 2, 1, 592), (8, 4, 1, 1968)])
def test_the_papers_costs(beams, candidates, lookahead, nfe):
    host = GaussianHost(linear_grid(50), shape=(1,))
    finished(LatentBeamSearch(None, beams, candidates, lookahead, 1.0, reuse=False), host.problem())
    assert host.rows == nfe
    reused = GaussianHost(linear_grid(50), shape=(1,))
    problem = reused.problem()
    finished(LatentBeamSearch(None, beams, candidates, lookahead, 1.0), problem)
    assert reused.rows == problem.ledger.spent["denoiser_rows"] == beams + 49 * beams * candidates * lookahead
    assert reused.scored == 49 * beams * candidates + beams


@pytest.mark.parametrize("host", [GaussianHost(linear_grid(8)), DiffusionHost(diffusion_grid(8))])
def test_lookahead_of_one_is_the_posterior_mean_and_of_many_the_end_of_the_flow(host):
    problem = host.problem()
    particles = problem.propose(problem.start(6), ddim(host.grid.at(0), host.grid.at(1), 1.0), at=0)
    level = host.grid.at(1)
    seen, mean = look_ahead(problem, particles, 1)
    assert torch.equal(mean.latents, seen.x0)
    variance = float(level.alpha**2 * host.std**2 + level.sigma**2)
    closed = host.mean + float(level.alpha) * host.std**2 / variance * (
        particles.latents - float(level.alpha) * host.mean
    )
    assert torch.allclose(mean.latents, closed, atol=1e-5)
    end = host.flow(particles.latents, level)
    errors = [float((look_ahead(problem, particles, count)[1].latents - end).abs().max()) for count in (1, 8, 64)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2] and errors[2] < 0.05


def test_lookahead_error_falls_in_proportion_to_its_steps():
    """DDIM without noise is a solver of first order."""
    host = GaussianHost()
    problem = host.problem()
    particles = problem.propose(problem.start(6), ode(host.grid.at(2)), at=0)
    end = host.flow(particles.latents, host.grid.at(2))
    coarse, fine = (float((look_ahead(problem, particles, count)[1].latents - end).norm()) for count in (100, 200))
    assert coarse / fine == pytest.approx(2, rel=0.1)


def test_deterministic_steps_with_several_candidates_are_refused():
    with pytest.raises(Unsupported, match=r"2 candidates of a deterministic step \(eta=0\).*pass eta=1.0"):
        finished(LatentBeamSearch(None), GaussianHost(eta=0.0).problem())


def test_eta_is_the_pipelines_own_if_none_is_given():
    own, given = (
        finished(LatentBeamSearch(None, 2, 2, 2, eta), GaussianHost(eta=0.7).problem()) for eta in (None, 0.7)
    )
    assert torch.equal(own.latents, given.latents)


def test_without_noise_all_candidates_are_the_same():
    problem = GaussianHost().problem()
    children = problem.propose(problem.start(3), ddim(problem.grid.at(0), problem.grid.at(1), 0.0), at=0, candidates=4)
    assert torch.equal(children.latents, children.gather(torch.arange(3) * 4).repeat(4).latents)
    assert all(move.noise is None for trail in children.trails for move in trail.moves)


def test_more_search_finds_more():
    def reward(search):
        return sum(float(finished(search, GaussianHost(seed=seed).problem()).reward[0]) for seed in range(8)) / 8

    plain, greedy, beams = (reward(LatentBeamSearch(None, b, k, 1, 1.0)) for b, k in ((1, 1), (1, 4), (3, 4)))
    assert plain < greedy < beams


@pytest.mark.parametrize("rows_per_call", [1, 3])
def test_grouping_rows_differently_changes_nothing(rows_per_call):
    search = LatentBeamSearch(None, 3, 2, 3, 1.0)
    whole = finished(search, GaussianHost().problem())
    parts = finished(search, GaussianHost().problem(rows_per_call=rows_per_call))
    assert parts.trails == whole.trails
    assert torch.allclose(parts.latents, whole.latents, atol=1e-5)


def test_outside_the_search_range_every_beam_goes_on_alone():
    host = GaussianHost(linear_grid(10))
    problem = host.problem()
    finalists = finished(LatentBeamSearch(None, 3, 2, 4, 1.0, search_range=(0.8, 0.4)), problem)
    searched = [number for number in range(9) if 0.4 <= (9 - number) / 10 < 0.8]
    assert searched == [2, 3, 4, 5]
    assert host.scored == len(searched) * 6 + 3
    # an unsearched level is evaluated when it is left, three rows each; a searched one by its candidates' first look
    assert host.rows == 3 + len(searched) * 6 * 4 + 3 * (9 - len(searched))
    assert len(finalists) == 3
    noisy = [number for number, move in enumerate(finalists.trails[0].moves) if move.s > 0]
    assert noisy == searched  # a flow adds no noise of its own


def test_a_reward_that_is_no_number_loses():
    host = GaussianHost(reward=lambda clean: clean.flatten(1)[:, 0].where(clean.flatten(1)[:, 0] < 0.5, torch.nan))
    finalists = finished(LatentBeamSearch(None, 4, 4, 2, 1.0), host.problem())
    assert 0 < float(finalists.latents[0].flatten()[0]) < 0.5


def test_a_finalist_is_made_again_from_its_trail():
    host = GaussianHost()
    finalists = finished(LatentBeamSearch(None, 3, 2, 3, 1.0), host.problem())
    assert torch.allclose(replayed(host, finalists.trails), finalists.latents, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beams": 0}, "beams, the latents kept, is at least 1; got 0"),
        ({"candidates": 0}, "candidates, the successors of each beam, is at least 1; got 0"),
        ({"lookahead": 0}, "lookahead is at least 1, the posterior mean; got 0"),
        ({"eta": -1.0}, "eta is at least 0"),
        ({"search_range": (0.2, 0.8)}, "1 >= high > low >= 0; got"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        LatentBeamSearch(None, **settings)


def test_products_are_the_goldens():
    golden, _ = load("dlbs/ddim_step")
    assert torch.allclose(cumulative_alphas().float(), golden["alphas_cumprod"], atol=1e-6)
