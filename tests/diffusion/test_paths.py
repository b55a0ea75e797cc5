"""Paths agree with the released code, with their own derivatives, and with each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.particles import Level
from diffusion.paths import DIFFUSIONS, Linear, Polynomial, VariancePreserving, path_named
from tests.diffusion.gaussian import GaussianHost
from tests.vision_tokens.golden import load

PATHS = {"linear": Linear(), "vp": VariancePreserving(), "poly2": Polynomial(2.0), "poly0p5": Polynomial(0.5)}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
inner_times = torch.linspace(0.02, 0.98, 33, dtype=torch.float64)


def close(ours, theirs):
    return torch.allclose(ours.float(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_coefficients_are_the_released_ones(name):
    golden, _ = load("rbf/coefficients")
    path, r = PATHS[name], golden["r"].double()
    level, slopes = path.level(r), path.slopes(r)
    assert close(level.alpha, golden[f"{name}.alpha_t"]) and close(level.sigma, golden[f"{name}.sigma_t"])
    assert close(slopes[0], golden[f"{name}.d_alpha_t"]) and close(slopes[1], golden[f"{name}.d_sigma_t"])
    assert close(Linear().meet(level)[0], golden[f"{name}.t_linear"])
    assert close(path.time(level.alpha / level.sigma), golden[f"{name}.time_from_snr"])


@every_path
def test_slopes_are_the_derivatives(path):
    step = 1e-6
    after, before = path.level(inner_times + step), path.level(inner_times - step)
    for slope, high, low in zip(path.slopes(inner_times), after, before, strict=True):
        assert torch.allclose(slope, (high - low) / (2 * step), atol=1e-6, rtol=1e-6)


@every_path
def test_time_undoes_the_ratio_and_knows_both_ends(path):
    level = path.level(inner_times)
    assert torch.allclose(path.time(level.alpha / level.sigma), inner_times, atol=1e-9)
    assert float(path.time(torch.tensor(torch.inf, dtype=torch.float64))) == 0


@pytest.mark.parametrize(
    ("name", "path"), [("conversion_vp", VariancePreserving()), ("conversion_poly2", Polynomial(2.0))]
)
def test_conversion_is_the_released_one(name, path):
    golden, _ = load(f"rbf/{name}")
    r, x = golden["r"].double().flatten(), golden["x"]
    time, scale = Linear().meet(path.level(r))
    there = (x.double() / scale[:, None, None]).float()
    assert close(there, golden["x_model"]) and close(time, golden["t_model"].flatten())
    x0, eps = Linear().split(time, golden["x_model"], golden["u_model"])
    assert close(x0, golden["tweedie"])
    assert close(path.velocity(r, x0, eps), golden["u_new"])
    assert close(path.score(r, eps), golden["score_new"])
    assert close(Linear().score(time, eps), golden["score_linear_at_model_point"])


@every_path
def test_velocity_and_score_of_a_gaussian_have_their_closed_forms(path):
    host = GaussianHost(mean=0.3, std=0.7, shape=())
    x = torch.linspace(-2, 2, len(inner_times), dtype=torch.float64)
    level = path.level(inner_times)
    x0, eps = host.posterior(x, level, host.mean)
    variance = level.alpha**2 * host.std**2 + level.sigma**2
    signal, noise = path.slopes(inner_times)
    closed = signal * host.mean + (level.alpha * signal * host.std**2 + level.sigma * noise) / variance * (
        x - level.alpha * host.mean
    )
    velocity = path.velocity(inner_times, x0, eps)
    assert torch.allclose(velocity, closed, atol=1e-9)
    assert torch.allclose(path.score(inner_times, eps), -(x - level.alpha * host.mean) / variance, atol=1e-9)
    for ours, again in zip((x0, eps), path.split(inner_times, x, velocity), strict=True):
        assert torch.allclose(ours, again, atol=1e-8)


@every_path
@settings(max_examples=20)
@given(time=st.floats(0.05, 0.95), stretch=st.floats(0.1, 10))
def test_a_latent_of_any_path_meets_every_other(path, time, stretch):
    level = Level(*(stretch * value for value in path.level(time)))
    for other in PATHS.values():
        there, scale = other.meet(level)
        assert torch.allclose(scale * torch.stack(other.level(there)), torch.stack(level), rtol=1e-7)


def test_clean_latents_meet_at_time_zero_and_pure_noise_at_one():
    time, scale = Linear().meet(Level.of([2.0, 0.0], [0.0, 3.0]))
    assert time.tolist() == [0, 1] and scale.tolist() == [2, 3]


@pytest.mark.parametrize("path_name", ["vp", "linear"])
@pytest.mark.parametrize("name", ["square", "linear", "constant", "sigma", "sin", "clipping"])
def test_diffusion_coefficients_are_the_released_ones(name, path_name):
    golden, _ = load("rbf/sde_step")
    r = golden[f"{name}.{path_name}.r"].double()
    assert close(3.0 * DIFFUSIONS[name](path_named(path_name), r), golden[f"{name}.{path_name}.g"])
