"""Steps keep the marginals that they promise to keep."""

import pytest
import torch

from diffusion.particles import Level, Step, weighted
from diffusion.paths import DIFFUSIONS, Linear, Polynomial, VariancePreserving, path_named
from diffusion.steps import ddim, euler_maruyama, ode, renoise
from tests.diffusion.gaussian import GaussianHost, diffusion_grid, linear_grid
from tests.vision_tokens.golden import load

PATHS = {"linear": Linear(), "vp": VariancePreserving(), "polynomial": Polynomial(2.0)}
HOST = GaussianHost(mean=0.3, std=0.7, shape=())


def marginal(level: Level) -> tuple[float, float]:
    """Mean and variance of noisy latents at a level."""
    return float(level.alpha) * HOST.mean, float(level.alpha**2 * HOST.std**2 + level.sigma**2)


def slopes(levels: Level, steps: Step) -> list[tuple[float, float, float, float, float]]:
    """(alpha m, V, slope, intercept, noise) of steps from levels: x' = intercept + slope (x - alpha m) + noise z.

    (x0, eps) are affine in x.
    """
    width = levels.alpha**2 * HOST.std**2 + levels.sigma**2
    slope = steps.p * levels.alpha * HOST.std**2 / width + steps.q * levels.sigma / width
    values = (levels.alpha * HOST.mean, width, slope, steps.p * HOST.mean, steps.s)
    return list(zip(*(value.reshape(-1).tolist() for value in values), strict=True))


def carried(mean: float, variance: float, levels: Level, steps: Step) -> tuple[float, float]:
    """Mean and variance after the steps, one after another, of latents that had these."""
    for centre, _, slope, intercept, noise in slopes(levels, steps):
        mean, variance = intercept + slope * (mean - centre), slope**2 * variance + noise**2
    return mean, variance


def run_of(path, name, count) -> tuple[Level, Step, Level]:
    """The levels and Euler-Maruyama steps from time 0.9 to 0.2, and the last level."""
    times = torch.linspace(0.9, 0.2, count + 1, dtype=torch.float64)
    now = times[:-1]
    return path.level(now), euler_maruyama(path, now, times[1:], DIFFUSIONS[name](path, now)), path.level(times[-1])


@pytest.mark.parametrize("path", ["vp", "linear"])
@pytest.mark.parametrize("name", ["square", "linear", "constant", "sigma", "sin", "clipping"])
def test_stochastic_steps_are_the_released_ones(name, path):
    golden, _ = load("rbf/sde_step")
    x, u, r, dr, noise, x_prev = (golden[f"{name}.{path}.{key}"] for key in ("x", "u", "r", "dr", "noise", "x_prev"))
    time = r.double().flatten()
    chosen = path_named(path)
    x0, eps = chosen.split(time, x, u)
    p, q, s, level = euler_maruyama(chosen, time, time - dr.flatten(), 3.0 * DIFFUSIONS[name](chosen, time))
    assert torch.allclose(weighted(p, x0) + weighted(q, eps) + weighted(s, noise), x_prev, atol=1e-5)
    assert torch.allclose(level.alpha, chosen.alpha(time - dr.flatten()))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", DIFFUSIONS)
def test_an_euler_maruyama_step_is_the_sheets_recursion(path, name):
    """M' = M + h (d' + A (M - alpha m)), W' = (1 + h A)^2 W + g^2 h, for latents off their marginal, too."""
    now, later = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.55, dtype=torch.float64)
    g, h = 1.3 * DIFFUSIONS[name](path, now), float(now - later)
    level, (signal, noise) = path.level(now), path.slopes(now)
    centre, width = marginal(level)
    pull = -float(level.alpha * signal * HOST.std**2 + level.sigma * noise) / width - float(g) ** 2 / (2 * width)
    mean, variance = 0.9, 0.4
    expected = (
        mean + h * (-float(signal) * HOST.mean + pull * (mean - centre)),
        (1 + h * pull) ** 2 * variance + float(g) ** 2 * h,
    )
    assert carried(mean, variance, level, euler_maruyama(path, now, later, g)) == pytest.approx(expected)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", DIFFUSIONS)
def test_the_stochastic_flow_has_the_marginals_of_the_deterministic_one(path, name):
    """The exact recursion within the steps' bias, and 50,000 samples within their error."""
    levels, steps, end = run_of(path, name, 80)
    mean, variance = carried(*marginal(levels.at(0)), levels, steps)
    expected_mean, expected_variance = marginal(end)
    assert mean == pytest.approx(expected_mean, abs=0.01)
    assert variance == pytest.approx(expected_variance, rel=0.08)

    generator = torch.Generator().manual_seed(0)
    start, width = marginal(levels.at(0))
    x = start + width**0.5 * torch.randn(50_000, generator=generator)
    for centre, _, slope, intercept, noise in slopes(levels, steps):
        x = (x - centre) * slope + intercept
        if noise:
            x += noise * torch.randn(50_000, generator=generator)
    assert float(x.mean()) == pytest.approx(mean, abs=4 * (variance / len(x)) ** 0.5)
    assert float(x.var()) == pytest.approx(variance, rel=4 * (2 / len(x)) ** 0.5)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", DIFFUSIONS)
def test_the_marginals_error_falls_in_proportion_to_the_step(path, name):
    """Weak order 1, which is Euler-Maruyama's."""

    def error(count):
        levels, steps, end = run_of(path, name, count)
        return carried(*marginal(levels.at(0)), levels, steps)[1] - marginal(end)[1]

    assert error(800) / error(1600) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("grid", [linear_grid, diffusion_grid], ids=["flow", "diffusion"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_marginals_in_the_limit_with_first_order(grid, eta):
    def error(count):
        levels = grid(count)
        now, to = (Level(*(value[part] for value in levels)) for part in (slice(-2), slice(1, -1)))
        steps = ddim(now, to, eta)
        assert torch.allclose(steps.q**2 + steps.s**2, to.sigma**2)
        return carried(*marginal(now.at(0)), now, steps)[1] - marginal(to.at(-1))[1]

    assert abs(error(250)) < 0.03
    assert error(250) / error(500) == pytest.approx(2, rel=0.25)


def test_ddim_of_a_scaled_path_is_the_scaled_step():
    now, to = diffusion_grid(10).at(3), diffusion_grid(10).at(4)
    scaled = (Level(*(value / sum(level) for value in level)) for level in (now, to))
    step, other = ddim(now, to, 0.8), ddim(*scaled, 0.8)
    assert [float(value) for value in step[:3]] == pytest.approx([float(value * sum(to)) for value in other[:3]])


def test_ddim_with_eta_one_adds_the_noise_of_the_paths_own_sde():
    """s^2 = g^2 h + O(h^2) with g^2 = 2 (sigma sigma' - sigma^2 alpha'/alpha): beta if variance preserving."""
    now, h = torch.tensor(0.5, dtype=torch.float64), 1e-5
    for path in PATHS.values():
        (alpha, sigma), (signal, noise) = path.level(now), path.slopes(now)
        g2 = 2 * (sigma * noise - sigma**2 * signal / alpha)
        step = ddim(path.level(now), path.level(now - h), 1.0)
        assert float(step.s**2 / h) == pytest.approx(float(g2), rel=1e-3)


def test_from_pure_noise_ddim_draws_afresh():
    p, q, s, _ = ddim(Level.of(0.0, 1.0), Level.of(0.2, 0.8), 1.0)
    assert (float(p), float(q), float(s)) == (0.2, 0.0, 0.8)
    assert float(ddim(Level.of(0.0, 1.0), Level.of(0.2, 0.8), 0.0).q) == pytest.approx(0.8)


def test_without_noise_all_steps_are_the_flows_euler_step():
    levels = linear_grid(10)
    now, to = levels.at(3), levels.at(4)
    for step in (
        ddim(now, to, 0.0),
        ode(to),
        euler_maruyama(Linear(), now.sigma, to.sigma, torch.zeros_like(now.sigma)),
    ):
        assert [float(value) for value in step[:3]] == pytest.approx([float(to.alpha), float(to.sigma), 0.0])


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_renoising_is_the_forward_process_exactly(path):
    now, to = path.level(0.2), path.level(0.8)
    mean, variance = carried(*marginal(now), now, renoise(now, to))
    assert (mean, variance) == pytest.approx(marginal(to), rel=1e-9)


def test_renoising_to_less_noise_is_refused():
    with pytest.raises(ValueError, match=r"re-noising goes to more noise; got alpha/sigma from .* take an `ode`"):
        renoise(Linear().level(0.8), Linear().level(0.2))


def test_steps_of_many_rows_are_the_steps_of_each():
    levels = linear_grid(6)
    together = ddim(Level(*(value[:-2] for value in levels)), Level(*(value[1:-1] for value in levels)), 0.6)
    for number in range(5):
        alone = ddim(levels.at(number), levels.at(number + 1), 0.6)
        assert [float(value) for value in alone[:3]] == [float(value) for value in together.at(number)[:3]]
