"""Particle filters: the released codes' numbers, and the laws of every run."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion import particle_filter
from diffusion.particle_filter import ParticleFilter
from diffusion.resampling import SCHEMES, normalised
from diffusion.rewards import Brightness
from mmaccel.methods import Unsupported
from tests.diffusion.gaussian import DiffusionHost, GaussianHost, diffusion_grid, linear_grid
from tests.diffusion.searching import PAPER, finished, replayed
from tests.vision_tokens.golden import load

DDPM = {"path": "pipeline", "eta": 1.0}
POTENTIALS = ("difference", "max", "sum", "reward")


# What the released codes compute.


def fk_traces():
    golden, _ = load("particle_filtering/fk_traces")
    names = sorted({key.rsplit(".", 1)[0] for key in golden})
    return {
        name: {key.rsplit(".", 1)[1]: golden[key] for key in golden if key.startswith(f"{name}.")} for name in names
    }


@pytest.mark.parametrize("name", fk_traces())
def test_released_arithmetic_gives_the_released_weights_and_decisions(name, monkeypatch):
    """A whole run of the method: the trace's rewards and draws go in, everything else comes out."""
    trace = fk_traces()[name]
    weight, particles, steps, start, end, every, adaptive = trace["meta"].tolist()
    rewards = iter(trace["rewards"])
    draws = iter(row for row in trace["indices"] if row[0] >= 0)
    weights, after, numbers = [], [], []

    def ancestors(log_weight, uniforms):
        weights.append(log_weight.exp())
        return next(draws)

    def seed_of(seed, kind, number):
        numbers.append(number)
        return seed

    resampled = ParticleFilter.resampled
    monkeypatch.setitem(SCHEMES, "multinomial", ancestors)
    monkeypatch.setattr(particle_filter, "seed_of", seed_of)
    monkeypatch.setattr(
        ParticleFilter, "resampled", lambda *arguments: after.append(resampled(*arguments)) or after[-1]
    )
    potential = {"diff": "difference", "max": "max", "add": "sum", "rt": "reward"}[name.split(".")[0]]
    method = ParticleFilter(
        None,
        int(particles),
        weight,
        potential,
        resample_below=0.5 if adaptive else 1.0,
        resampling="multinomial",
        start=int(start),
        every=int(every),
        end=int(end),
        released=True,
        **DDPM,
    )
    finished(method, DiffusionHost(diffusion_grid(int(steps)), reward=lambda clean: next(rewards)).problem())
    drawn = trace["indices"][:, 0] >= 0
    assert numbers == trace["sampling_idx"][drawn].tolist()
    assert (
        torch.allclose(torch.stack(weights).float(), trace["weights"][drawn], rtol=1e-5) if weights else not drawn.any()
    )
    for row, state in enumerate(after):
        assert torch.allclose(state.extra["stored"].float(), trace["population_rewards"][row], atol=1e-5)
        assert torch.allclose(state.extra["paid"].exp().float(), trace["product_of_potentials"][row], rtol=1e-5)
        assert [trail.chain for trail in state.trails] == trace["ancestor"][row].tolist()


def test_smc_on_the_vp_path_is_the_released_code_s(monkeypatch):
    golden, _ = load("rbf/smc_vp_sde")
    particles, _, steps, _ = golden["config"].tolist()
    target, mean, std, beta = golden["target_mean_std"].tolist()
    noises, indices = golden["noises"], golden["resample_indices"]
    weights = []

    def ancestors(log_weight, uniforms):
        weights.append(normalised(log_weight))
        return indices[len(weights) - 1]

    monkeypatch.setitem(SCHEMES, "multinomial", ancestors)
    host = GaussianHost(
        linear_grid(steps),
        mean=mean,
        std=std,
        target=target,
        initials=golden["init_noise"],
        draws=lambda key: noises[key[0], key[1]],
    )
    problem = host.problem()
    method = ParticleFilter(None, particles, 1 / beta, resample_below=1.0, resampling="multinomial", path="vp", **PAPER)
    latents = []
    propose = problem.propose

    def proposed(*arguments, **named):
        children = propose(*arguments, **named)
        latents.append(children.latents)
        return children

    problem.propose = proposed
    finalists = finished(method, problem)
    for number in range(steps - 1):
        assert torch.allclose(weights[number], golden["resample_weights"][number], atol=1e-5)
        assert torch.allclose(latents[number], golden["kept_latents"][number], atol=1e-5)
    final = normalised(finalists.extra["log_weight"])
    assert torch.allclose(final.sort().values, golden["resample_weights"][-1].sort().values, atol=1e-5)
    assert torch.allclose(
        finalists.reward.sort().values, golden["rewards"][-particles:].double().sort().values, atol=1e-5
    )
    assert torch.allclose(finalists.latents[:1], golden["final_x0"], atol=1e-5)
    assert host.rows == int(golden["model_nfe"])


# Laws of every run.

schedules = st.fixed_dictionaries(
    {"start": st.integers(0, 3), "every": st.integers(1, 4), "end": st.none() | st.integers(3, 9)}
)


@settings(max_examples=30, deadline=None)
@given(schedules, st.sampled_from(POTENTIALS), st.integers(0, 99), st.none() | st.integers(1, 5))
def test_without_resampling_the_weight_at_the_end_is_lambda_times_the_final_reward(schedule, potential, seed, broken):
    """Also if a reward on the way was not a number."""
    calls = []

    def reward(clean):
        calls.append(clean.flatten(1).mean(dim=1))
        return calls[-1].masked_fill(torch.arange(len(clean)) == 2, torch.nan) if len(calls) == broken else calls[-1]

    host = GaussianHost(linear_grid(6), reward=reward, seed=seed)
    method = ParticleFilter(None, 5, 3.0, potential, 1e-6, **schedule)
    acting = sum(method.acts(number, 6) for number in range(6))
    broken = broken if broken and broken < acting else None
    finalists = finished(method, host.problem())
    assert torch.allclose(finalists.extra["log_weight"], 3.0 * finalists.reward, rtol=1e-9)


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("extra", [{}, {"anneal": "ess"}, {"look_ahead": 1}], ids=str)
def test_constant_rewards_leave_particles_and_weights_alone(potential, extra):
    host = GaussianHost(reward=lambda clean: torch.full((len(clean),), 0.7))
    finalists = finished(ParticleFilter(None, 6, 5.0, potential, **extra), host.problem())
    assert [trail.chain for trail in finalists.trails] == list(range(6))
    assert torch.allclose(normalised(finalists.extra["log_weight"]), torch.full((6,), 1 / 6).double())


METHODS = [
    ParticleFilter(None, 6, 50.0, resample_below=0.9),
    ParticleFilter(None, 6, 8.0, resample_below=1.0, **DDPM),
    ParticleFilter(None, 5, 8.0, "max", resampling="multinomial", path="linear", times="uniform"),
    ParticleFilter(None, 6, 8.0, start=2, every=3, end=8, anneal="ess", look_ahead=2),
]


@pytest.mark.parametrize("method", METHODS, ids=[0, 1, 2, 3])
class TestEveryFilter:
    def test_finalists_are_all_particles_best_first_and_can_be_retold_from_their_seeds(self, method):
        host = GaussianHost()
        problem = host.problem()
        finalists = finished(method, problem)
        assert len(finalists) == method.particles
        assert (finalists.reward.diff() <= 0).all()
        assert torch.allclose(host.rewards(finalists.latents), finalists.reward, atol=1e-6)
        assert torch.allclose(replayed(host, finalists.trails), finalists.latents, atol=1e-5)

    def test_settings_survive_being_written_down(self, method):
        written = replace(method, reward=Brightness())
        assert ParticleFilter.from_dict(written.to_dict()) == written

    def test_copies_of_a_particle_go_separate_ways(self, method):
        finalists = finished(method, GaussianHost().problem())
        assert finalists.ancestors() < len(finalists)
        assert len(finalists.latents.unique(dim=0)) == len(finalists)

    def test_the_same_seed_gives_the_same_result_however_rows_are_grouped(self, method):
        whole = finished(method, GaussianHost(seed=5).problem())
        for rows_per_call in (1, 4):
            parts = finished(method, GaussianHost(seed=5).problem(rows_per_call=rows_per_call))
            assert parts.trails == whole.trails
            assert torch.allclose(parts.latents, whole.latents, atol=1e-5)

    def test_the_ledger_equals_what_was_seen_and_the_cost_is_the_docstring_s(self, method):
        host = GaussianHost(guidance=(1.5, 0.0))
        problem = host.problem()
        finished(method, problem)
        steps = problem.steps
        acting = sum(method.acts(number, steps) for number in range(steps))
        looks = acting - 1
        assert problem.ledger.spent == {"denoiser_rows": host.rows, "reward_calls": host.scored}
        assert host.rows == 2 * method.particles * (steps + looks * method.look_ahead)
        assert host.scored == method.particles * (acting + (looks if method.look_ahead else 0))

    def test_a_particle_whose_reward_is_no_number_leaves_no_copies(self, method):
        calls = []

        def reward(clean):
            values = clean.flatten(1).mean(dim=1)
            calls.append(values)
            return values.masked_fill(torch.arange(len(values)) == 1, torch.nan) if len(calls) == 1 else values

        always = replace(method, resample_below=1.0, look_ahead=0, start=0)
        finalists = finished(always, GaussianHost(reward=reward).problem())
        assert 1 not in {trail.chain for trail in finalists.trails}

    def test_if_no_reward_is_a_number_all_particles_go_on(self, method):
        host = GaussianHost(reward=lambda clean: torch.full((len(clean),), torch.nan))
        finalists = finished(method, host.problem())
        assert [trail.chain for trail in finalists.trails] == list(range(method.particles))


def test_steering_raises_the_mean_reward_of_all_particles():
    def mean_reward(weight):
        method = ParticleFilter(None, 8, weight, resample_below=1.0, path="pipeline", eta=1.0)
        hosts = [GaussianHost(seed=seed, reward=lambda clean: clean.flatten(1).mean(dim=1)) for seed in range(10)]
        return sum(float(finished(method, host.problem()).reward.mean()) for host in hosts) / 10

    rewards = [mean_reward(weight) for weight in (1e-3, 2.0, 10.0)]
    assert rewards == sorted(rewards)
    assert rewards[-1] > rewards[0] + 0.1


def test_one_particle_is_the_plain_sampler_and_leaves_nothing_to_choose():
    method = ParticleFilter(None, 1, path="pipeline")
    assert not method.chooses
    host = GaussianHost()
    finalists = finished(method, host.problem())
    assert torch.allclose(finalists.latents, host.sample(host.initial(0), [0]), atol=1e-6)
    assert ParticleFilter(None, 2).chooses


def test_a_sampler_without_noise_is_refused():
    with pytest.raises(Unsupported, match=r"none of the 9 steps before the last adds noise.*pass eta=1.0"):
        next(ParticleFilter(None, path="pipeline").search(GaussianHost().problem()))


def test_a_filter_that_would_begin_after_the_end_is_refused():
    with pytest.raises(ValueError, match=r"first acts at step start=10, .* but the run has 10 steps; .* at most 9"):
        next(ParticleFilter(None, start=10).search(GaussianHost().problem()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"particles": 0}, r"particles is at least 1; got 0"),
        ({"weight": 0.0}, r"weight multiplies the reward and is above 0 \(exp\(r / beta\) is 1 / beta.*; got 0.0"),
        ({"potential": "best"}, r"potential is one of .*'difference', 'max', 'sum', 'reward'.*; got 'best'"),
        ({"resample_below": 4}, r"resample_below is a share, in \(0, 1\] \(1 is always\); got 4"),
        ({"resampling": "fair"}, r"resampling is one of systematic, stratified, residual, multinomial; got 'fair'"),
        ({"start": -1}, r"start, the first step that acts, is at least 0; got -1"),
        ({"every": 0}, r"every, the distance of steps that act, is at least 1; got 0"),
        ({"start": 5, "end": 4}, r"end, the last step that acts, is not before start=5; got 4"),
        ({"anneal": "slowly"}, r"anneal is one of .*'ess', 'entropy', 'base'.*; got 'slowly'"),
        ({"look_ahead": -1}, r"look_ahead counts evaluations and is at least 0; got -1"),
        ({"released": True, "anneal": "ess"}, r"knows neither anneal nor look_ahead: leave them at None and 0; got"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ParticleFilter(None, **wrong)
