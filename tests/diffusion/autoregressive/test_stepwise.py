"""Trajectories verified step by step: the target's law, whatever stands, and how much of a draft does."""

import pytest
import torch
from scipy import integrate, stats

from diffusion.autoregressive.acceptance import settle
from diffusion.autoregressive.chains import reread, sweep_on, walk, walk_on
from diffusion.autoregressive.stepwise import StepRule, compare, excess_of
from mmaccel.ledger import Ledger
from tests.diffusion.autoregressive.gaussian import Affine, draws, ks

COUNT = 20_000
MANY = pytest.param(200_000, marks=pytest.mark.slow)


def chains(count, size=1, steps=5, apart=0.1):
    """A target and a draft of equal stds, whose means lie apart by more than a constant."""
    none = torch.zeros(count, dtype=torch.float64)
    target = Affine((0.9,) * steps, (0.1,) * steps, (0.4,) * steps, none, size=size)
    return target, Affine((0.9 - apart,) * steps, (0.1 + apart,) * steps, (0.4,) * steps, none, size=size)


def speculated(p, q, count, sweeps=None):
    rule, stream = StepRule(Ledger(), sweeps), draws(count)
    drafted = rule.draft(q, stream)
    tokens, kept = settle(rule.verify(drafted, p, q), drafted.token, stream.uniform(), stream)
    return tokens, float(kept.double().mean())


@pytest.mark.parametrize("count", [COUNT, MANY])
@pytest.mark.parametrize("sweeps", [None, 3])
@pytest.mark.parametrize("size", [1, 3])
def test_tokens_have_the_targets_law(count, size, sweeps):
    """A direction and the norm; the draft's own tokens are told apart by the same test."""
    p, q = chains(count, size)
    tokens, kept = speculated(p, q, count, sweeps)
    mean, std = p.law()
    direction = torch.tensor([0.6, 0.0, 0.8] if size == 3 else [1.0], dtype=torch.float64)
    assert 0.3 < kept < 0.9
    for found, same in ((tokens, True), (walk(q, draws(count)).token, False)):
        along = ks(found @ direction, float(direction.sum()) * mean, std)
        across = stats.kstest((((found - mean) / std) ** 2).sum(1).numpy(), "chi2", args=(size,)).pvalue
        assert (min(along, across) > 1e-3) == same


@pytest.mark.parametrize("count", [COUNT, MANY])
def test_whole_trajectories_have_the_targets_law(count):
    """The innovations of steps by the target's laws are standard normal and uncorrelated, up to the one redrawn."""
    p, q = chains(count, steps=3, apart=0.2)
    drafted = walk(q, draws(count))
    found = compare(drafted, reread(p, drafted.states))
    refused = (draws(count, 1).uniform().log() >= found.log_weights[-1]).nonzero()[:, 0]
    state, at = found.turned(refused, draws(count, 2).at(refused), Ledger())
    states = drafted.states.clone()
    reached = torch.full((count,), 3).index_copy(0, refused, at)
    states[at, refused] = state
    laws = reread(p, states)
    innovations = ((states[1:] - laws.mean) / laws.std)[..., 0]
    number = torch.arange(3)[:, None]
    assert len(set(at.tolist())) == 3
    whole = torch.where(
        number < reached, innovations, torch.randn(3, count, generator=torch.Generator().manual_seed(3))
    )
    for step in whole:
        assert ks(step) > 1e-3
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert abs(float((whole[one] * whole[other]).mean())) * count**0.5 < 4
    assert ks(((drafted.states[1:] - laws.mean) / laws.std)[1]) < 1e-6  # the draft's are not


@pytest.mark.parametrize("sweeps", [None, 2])
def test_rows_go_on_from_where_they_stand(sweeps):
    """Half a trajectory is given; the rest has the target's law, for rows at different steps."""
    count = 20_000
    p, q = chains(count, steps=4)
    at = torch.arange(count) % 5
    start = torch.full((count, 1), 0.7, dtype=torch.float64)
    found = StepRule(Ledger(), sweeps).finished(p, q, start, at, draws(count))
    for done in range(5):
        rest = Affine((0.9,) * (4 - done), (0.1,) * (4 - done), (0.4,) * (4 - done), p.shift)
        mean, variance = 0.7, 0.0
        for slope, intercept, std in zip(rest.slopes, rest.intercepts, rest.stds, strict=True):
            mean, variance = slope * mean + intercept, slope**2 * variance + std**2
        tokens = found[at == done]
        assert (tokens == 0.7).all() if done == 4 else ks(tokens, mean, variance**0.5) > 1e-3


@pytest.mark.parametrize("sweeps", [None, 2])
def test_a_row_alone_draws_what_it_draws_among_others(sweeps):
    p, q = chains(6, steps=4, apart=0.3)
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    like = draws(6)
    stream = type(like)(tuple(generators), True, torch.arange(6), like.device, like.dtype)
    at = torch.tensor([0, 1, 2, 3, 0, 4])
    start = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    together = StepRule(Ledger(), sweeps).finished(p, q, start, at, stream)
    for row in range(6):
        one = torch.tensor([row])
        generators[row].manual_seed(row)
        alone = StepRule(Ledger(), sweeps).finished(p.at(one), q.at(one), start[one], at[one], stream.at(one))
        assert torch.allclose(alone[0], together[row])


def test_sweeps_near_the_walk_and_reach_it():
    """After as many sweeps as steps they are the walk; before, a law of their own, which they know."""
    count = 2000
    p, _ = chains(count, size=2, steps=4)
    none = torch.zeros(count, dtype=torch.long)
    noise = torch.randn(4, count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.randn(count, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    walked = walk_on(p, start, none, noise)
    assert torch.allclose(sweep_on(p, start, none, noise, 4).states, walked.states)
    away = [float((sweep_on(p, start, none, noise, sweeps).token - walked.token).norm()) for sweeps in (1, 2, 3, 4)]
    assert away[0] > 2 * away[1] > 4 * away[2] > 0 and away[3] < 1e-9
    found = sweep_on(p, start, none, noise, 2)
    assert torch.allclose((found.states[1:] - found.laws.mean) / found.laws.std, noise)
    assert [speculated(p, p, count, sweeps)[1] for sweeps in (4, None)] == [1.0, 1.0]
    assert 0.2 < speculated(p, p, count, 2)[1] < 0.98


def test_rows_of_a_sweep_wait_until_it_is_their_turn():
    p, _ = chains(5, steps=4)
    at, start = torch.arange(5), torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    noise = torch.randn(4, 5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(sweep_on(p, start, at, noise, 4).states, walk_on(p, start, at, noise).states)


def test_a_draft_that_is_the_target_stands_and_calls_nothing_more():
    p, _ = chains(1000)
    rule, drafted = StepRule(Ledger()), walk(p, draws(1000))
    assert torch.equal(rule.draw(p, lambda: p, draws(1000), draws(1000, 1)), drafted.token)
    assert not rule.ledger.spent


def test_one_step_is_kept_as_often_as_any_rule_could():
    """2 Phi(-d / 2) for means d stds apart; of more steps no more than 2 Phi(-sqrt(S) / 2)."""
    count = 100_000
    for steps in (1, 4):
        p, q = (
            Affine((1.0,) * steps, (shift,) * steps, (0.5,) * steps, torch.zeros(count, dtype=torch.float64))
            for shift in (0.0, 0.2)
        )
        _, kept = speculated(p, q, count)
        most = 2 * stats.norm.cdf(-(steps**0.5) * 0.4 / 2)
        assert kept == pytest.approx(most, abs=0.006) if steps == 1 else 0.85 * most < kept < most


@pytest.mark.parametrize(("weight", "apart"), [(1.0, 0.5), (0.7, 1.5), (0.4, 0.05), (1.0, 0.0), (0.3, 0.0)])
def test_the_excess_in_closed_form_is_the_integral(weight, apart):
    def more(x):
        return max(0.0, weight * stats.norm.pdf(x) - stats.norm.pdf(x, loc=apart))

    given = (torch.tensor(number, dtype=torch.float64) for number in (weight, apart))
    weight_given, apart_given = given
    by_hand = integrate.quad(more, -9, 9, limit=400, points=[0.0])[0] if apart else 0.0
    assert float(excess_of(weight_given.log(), apart_given)) == pytest.approx(by_hand, abs=1e-7)
