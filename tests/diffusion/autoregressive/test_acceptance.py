"""The rules of acceptance, where everything is Gaussian and the target's law is known; and the published numbers."""

import pytest
import torch
from scipy import integrate, stats

from diffusion.autoregressive.acceptance import (
    BoundedRule,
    LastStepRule,
    MixtureRule,
    PublishedRule,
    TrajectoryRule,
    published_ratio,
    residual,
    settle,
)
from diffusion.autoregressive.chains import Gaussians, log_density, reread, same_noise, walk
from mmaccel.ledger import Ledger
from tests.diffusion.autoregressive import gaussian
from tests.diffusion.autoregressive.gaussian import Affine, draws, ks
from tests.vision_tokens.golden import load

COUNT = 200_000
RULES = {
    "exact": TrajectoryRule(Ledger()),
    "exact-noise": LastStepRule(Ledger()),
    "published": PublishedRule(1.0, Ledger()),
}


def speculated(rule, p, q, count=COUNT, seed=0):
    """Tokens that came out of one test each, and the share of drafts that was kept."""
    stream = draws(count, seed)
    drafted = rule.draft(q, stream)
    tokens, kept = settle(rule.verify(drafted, p, q), drafted.token, stream.uniform(), stream)
    return tokens, float(kept.double().mean())


def chains(count=COUNT, **more):
    none = torch.zeros(count, dtype=torch.float64)
    return gaussian.target(none, **more), gaussian.draft(none, **more)


@pytest.mark.parametrize(("mode", "acceptance"), [("exact", 0.800), ("exact-noise", 0.826)])
def test_exact_rules_draw_the_targets_law(mode, acceptance):
    p, q = chains()
    tokens, kept = speculated(RULES[mode], p, q)
    assert ks(tokens, *p.law()) > 1e-3
    assert ks(tokens, *q.law()) < 1e-6  # the test can fail
    assert kept == pytest.approx(acceptance, abs=0.004)  # measured by the study


def test_the_published_rule_does_not():
    """Whose acceptance, mean and std the study measured; the same number of draws."""
    p, q = chains()
    tokens, kept = speculated(RULES["published"], p, q)
    assert ks(tokens, *p.law()) < 1e-6
    assert kept == pytest.approx(0.678, abs=0.004)
    assert float(tokens.mean()) == pytest.approx(0.4146, abs=0.01)
    assert float(tokens.std()) == pytest.approx(1.0649, abs=0.01)


@pytest.mark.parametrize(("tau", "acceptance", "mean"), [(0.1, 0.26, 0.267), (0.3, 0.73, 0.196), (0.6, 0.99, 0.095)])
def test_bounded_tokens_lie_within_tau_of_exact_ones(tau, acceptance, mean):
    p, q = chains()
    stream = draws(COUNT)
    drafted = walk(q, stream)
    verdict = BoundedRule(tau).verify(drafted, p, q)
    tokens, kept = settle(verdict, drafted.token, stream.uniform(), stream)
    exact = same_noise(p, drafted).token
    assert ks(exact, *p.law()) > 1e-3
    assert float((tokens - exact).abs().max()) <= tau + 1e-9
    assert float(kept.double().mean()) == pytest.approx(acceptance, abs=0.01)
    assert float(tokens.mean()) == pytest.approx(mean, abs=0.01)


def test_within_no_distance_it_is_exact():
    p, q = chains()
    tokens, kept = speculated(BoundedRule(0.0), p, q)
    assert ks(tokens, *p.law()) > 1e-3 and kept == 0


P_MIXTURE, Q_MIXTURE = ([0.3, 0.7], [-1.0, 0.8], [0.4, 0.6]), ([0.5, 0.5], [-0.8, 0.9], [0.5, 0.5])


def density(law, x):
    return sum(w * stats.norm.pdf(x, m, s) for w, m, s in zip(*law, strict=True))


def test_mixtures_are_exact_and_kept_as_often_as_any_rule_could():
    p, q = (gaussian.mixture(*law, COUNT) for law in (P_MIXTURE, Q_MIXTURE))
    tokens, kept = speculated(MixtureRule(Ledger()), p, q)

    def below(x):
        return sum(w * stats.norm.cdf(x, m, s) for w, m, s in zip(*P_MIXTURE, strict=True))

    assert stats.kstest(tokens[:, 0].numpy(), below).pvalue > 1e-3
    assert stats.kstest(q.draw(draws(COUNT))[:, 0].numpy(), below).pvalue < 1e-6
    overlap, _ = integrate.quad(lambda x: min(density(P_MIXTURE, x), density(Q_MIXTURE, x)), -6, 6, limit=200)
    assert kept == pytest.approx(overlap, abs=0.005)


def test_trajectories_of_vectors_are_exact_too():
    """Five steps in three dimensions: a direction and the norm, against closed forms."""
    none = torch.zeros(40_000, dtype=torch.float64)
    p = Affine((0.9,) * 5, (0.1,) * 5, (0.4,) * 5, none, size=3)
    q = Affine((0.88,) * 5, (0.12,) * 5, (0.42,) * 5, none, size=3)
    tokens, kept = speculated(TrajectoryRule(Ledger()), p, q, 40_000)
    mean, std = p.law()
    assert 0.5 < kept < 0.95
    assert ks(tokens @ torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64), 1.4 * mean, std) > 1e-3
    assert stats.kstest((((tokens - mean) / std) ** 2).sum(1).numpy(), "chi2", args=(3,)).pvalue > 1e-3


@pytest.mark.parametrize("steps", [1, 4])
def test_acceptance_is_that_of_two_gaussians(steps):
    """Equal stds: 2 Phi(-sqrt(S)/2), where S sums the squared shifts of the steps in units of their std."""
    none = torch.zeros(COUNT, dtype=torch.float64)
    p = Affine((1.0,) * steps, (0.0,) * steps, (0.5,) * steps, none)
    q = Affine((1.0,) * steps, (0.2,) * steps, (0.5,) * steps, none)
    _, kept = speculated(TrajectoryRule(Ledger()), p, q)
    assert kept == pytest.approx(2 * stats.norm.cdf(-((steps * 0.16) ** 0.5) / 2), abs=0.004)


@pytest.mark.parametrize("mode", ["exact", "exact-noise"])
def test_a_draft_that_is_the_target_is_always_kept(mode):
    p, _ = chains(1000)
    assert speculated(RULES[mode], p, p, 1000)[1] == 1.0


def test_a_rejected_token_costs_one_over_one_minus_the_acceptance():
    p, q = chains()
    rule = TrajectoryRule(Ledger())
    _, kept = speculated(rule, p, q)
    rejected = COUNT * (1 - kept)
    assert rule.ledger.spent["proposals"] / rejected > 1 / (1 - kept)  # drawn in batches, so a few more
    assert rule.ledger.spent["proposals"] / rejected < 1 / (1 - kept) + 12


def test_a_residual_without_mass_is_an_error_and_no_silent_token(monkeypatch):
    monkeypatch.setattr("diffusion.autoregressive.acceptance.GIVEN_UP", 1000)

    def never(chosen, stream):
        return torch.zeros(len(chosen), 1), torch.zeros(len(chosen), dtype=torch.float64)

    with pytest.raises(
        RuntimeError, match=r"1 rejected tokens found no replacement in 1\d{3} proposals: draft and target"
    ):
        residual(never, torch.tensor([0]), draws(1), Ledger())


def test_a_ratio_that_is_no_number_is_an_error():
    p, q = chains(3)
    drafted = walk(q, draws(3))
    spoilt = Affine(p.slopes, (torch.nan, 0.0), p.stds, p.shift)
    with pytest.raises(ValueError, match=r"a density ratio of draft and target is no number: .*NaN"):
        TrajectoryRule(Ledger()).verify(drafted, spoilt, q).kept(torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("size", ["d4", "d16"])
def test_density_ratios_are_the_official_ones_and_stay_finite(size):
    golden, _ = load("cspd/density_ratio")
    given = {key.removeprefix(f"{size}."): value for key, value in golden.items() if key.startswith(f"{size}.")}
    p, q = (Gaussians(given[f"mean_{name}"], given[f"std_{name}"]) for name in "pq")
    token, log_sigma = given["x"], (given["sumlog_p"].double() - given["sumlog_q"].double()).sum(-1)
    assert torch.allclose(log_sigma, given["oracle.log_sigma_code"]) and torch.equal(
        log_sigma, -given["oracle.log_sigma_paper"]
    )
    assert torch.allclose(p.log_density(token) - q.log_density(token), given["oracle.log_final_ratio"], rtol=1e-9)
    for softening in (1.0, 42.0):
        verdict = PublishedRule(softening, Ledger()).compare(token, p, q, log_sigma)
        assert verdict.log_ratio.isfinite().all()
        ratio = given[f"temp{softening}.ratio"]
        normal = (ratio > 1e-30) & ratio.isfinite()
        assert normal.sum() > 20
        assert torch.allclose(verdict.log_ratio[normal], ratio[normal].double().log(), rtol=1e-3, atol=1e-5)
        assert torch.equal(verdict.kept(given["u"].double()), given[f"temp{softening}.accept"].bool())


@pytest.mark.parametrize("size", ["d4", "d16"])
def test_proposals_pass_as_often_as_the_official_ones(size):
    """And every replacement that the release accepted has an excess (its noise was not written down)."""
    golden, _ = load("cspd/density_ratio")
    given = {key.removeprefix(f"{size}."): value for key, value in golden.items() if key.startswith(f"{size}.")}
    p, q = (Gaussians(given[f"mean_{name}"], given[f"std_{name}"]) for name in "pq")
    log_sigma = (given["sumlog_p"].double() - given["sumlog_q"].double()).sum(-1)
    first = p.mean + p.std * given["proposal_noise"][0]
    passing = -torch.expm1(published_ratio(first, p, q, log_sigma).clamp_max(0))
    assert torch.allclose(passing, given["residual_alpha0"].double(), atol=1e-4)
    rejected = ~given["temp42.0.accept"].bool()
    chosen = rejected.nonzero()[:, 0]
    excess = published_ratio(given["temp42.0.spec_sample"], p, q, log_sigma)[rejected]
    assert len(chosen) > 5 and (excess < 0).all()
    redrawn = PublishedRule(42.0, Ledger()).compare(given["x"], p, q, log_sigma).redraw(chosen, draws(len(chosen)))
    assert (published_ratio(redrawn, p.at(chosen), q.at(chosen), log_sigma[chosen]) < 0).all()
    assert ((redrawn - p.mean[chosen]) / p.std[chosen]).abs().max() < 6


TRAJECTORIES = sorted({key.split(".draft.")[0] for key in load("cspd/head_trajectory")[0] if ".draft.means" in key})


@pytest.mark.parametrize("case", TRAJECTORIES)
def test_trajectories_of_two_heads_are_the_official_ones(case):
    from tests.diffusion.autoregressive.tiny import official_head

    golden, _ = load("cspd/head_trajectory")
    given = {key.removeprefix(f"{case}."): value for key, value in golden.items() if key.startswith(f"{case}.")}
    steps, guidance, temperature = int(case[1:3]), float(case.split("cfg")[1][:3]), float(case.split("temp")[1])
    branches = 1 if guidance == 1 else 2
    rows = len(given["noise"]) // branches
    laws = {}
    for name in ("draft", "target"):
        conditions = given[f"z_{name}"].reshape(branches, rows, -1)
        laws[name] = official_head(name).laws(temperature, steps)(conditions, torch.full((rows,), guidance))

    class Written:
        def __init__(self):
            self.numbers = [given["noise"][:rows], *given["inter_noise"][:, :rows].flip(0)]

        def normal(self, *shape):
            return self.numbers.pop(0)

    drafted = walk(laws["draft"], Written())
    aligned = same_noise(laws["target"], drafted)
    for name, walked in (("draft", drafted), ("target", aligned)):
        assert torch.allclose(walked.laws.mean, given[f"{name}.means"][:, :rows], rtol=1e-3, atol=1e-3)
        assert torch.allclose(walked.laws.std, given[f"{name}.stds"][:, :rows], rtol=1e-4)
        assert torch.allclose(walked.last.mean, given[f"{name}.final_mean"][:rows], rtol=1e-3, atol=1e-3)
    read = reread(laws["target"], drafted.states)
    assert torch.allclose(read.mean, given["target_on_draft.means"][:, :rows], rtol=1e-3, atol=1e-3)
    ratio = read.log_density(drafted.states[1:])[:-1] - drafted.laws.log_density(drafted.states[1:])[:-1]
    assert torch.allclose(ratio, given["oracle.path_log_ratio_steps"][:, :rows], rtol=2e-3, atol=2e-2)
    assert torch.allclose(ratio.sum(0), given["oracle.path_log_ratio"][:rows], rtol=2e-3, atol=5e-2)


def test_a_trajectory_without_noise_at_its_end_keeps_its_mean():
    p, q = chains(10, noisy_end=False)
    drafted = walk(q, draws(10))
    assert torch.equal(drafted.token, drafted.last.mean)
    assert torch.equal(same_noise(p, drafted).token, same_noise(p, drafted).last.mean)


def test_the_density_of_a_trajectory_is_that_of_its_steps():
    p, q = chains(10)
    drafted = walk(q, draws(10))
    by_hand = sum(
        torch.distributions.Normal(drafted.laws.mean[step], drafted.laws.std[step]).log_prob(drafted.states[step + 1])
        for step in range(2)
    )
    assert torch.allclose(drafted.log_density(), by_hand[:, 0])
    assert torch.allclose(log_density(q, drafted.states), by_hand[:, 0])
    assert not torch.allclose(log_density(p, drafted.states), by_hand[:, 0])
