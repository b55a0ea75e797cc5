"""Every scheme is unbiased, and keeps what its docstring promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.resampling import (
    SCHEMES,
    accept_first,
    best_of_each,
    cumulative,
    draw,
    effective_sample_size,
    multinomial,
    normalised,
    residual,
    stratified,
    systematic,
    top,
    uniform_numbers,
)

log_weights = st.lists(st.floats(-30, 30) | st.just(-torch.inf), min_size=1, max_size=24).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)
seeds = st.integers(0, 2**31)
schemes = st.sampled_from(sorted(SCHEMES))


def copies_of(ancestors, count):
    return torch.bincount(ancestors, minlength=count).double()


@pytest.mark.parametrize("name", SCHEMES)
def test_the_expected_number_of_copies_is_n_w(name):
    """Expectations add up whether or not the draws are independent: so one number serves all, over [0, 1)."""
    log_weight = torch.tensor([0.3, -2.0, 1.7, -torch.inf, 0.0, 1.1, -0.4], dtype=torch.float64)
    points, count = 500, len(log_weight)
    copies = sum(
        copies_of(SCHEMES[name](log_weight, torch.full((count,), (point + 0.5) / points, dtype=torch.float64)), count)
        for point in range(points)
    )
    expected = count * normalised(log_weight)
    assert (copies / points - expected).abs().max() < count / points  # an edge of each draw's interval may be missed


def test_the_spread_of_the_copies_is_ordered_as_known():
    log_weight = torch.linspace(-1, 1, 8, dtype=torch.float64)

    def spread(scheme):
        runs = [copies_of(scheme(log_weight, uniform_numbers(8, seed)), 8) for seed in range(300)]
        return float(torch.stack(runs).var(dim=0).sum())

    weights = normalised(log_weight)
    assert spread(systematic) < spread(stratified) < spread(multinomial)
    assert spread(residual) < spread(multinomial)
    assert spread(multinomial) == pytest.approx(float((8 * weights * (1 - weights)).sum()), rel=0.2)


@given(log_weights, seeds)
def test_systematic_copies_are_within_one_of_n_w(log_weight, seed):
    copies = copies_of(systematic(log_weight, uniform_numbers(len(log_weight), seed)), len(log_weight))
    assert ((copies - len(log_weight) * normalised(log_weight)).abs() < 1 + 1e-9).all()


@given(log_weights, seeds)
def test_stratified_copies_are_within_two_and_residual_ones_never_a_whole_one_below(log_weight, seed):
    uniforms, expected = uniform_numbers(len(log_weight), seed), len(log_weight) * normalised(log_weight)
    assert ((copies_of(stratified(log_weight, uniforms), len(expected)) - expected).abs() < 2 + 1e-9).all()
    assert (copies_of(residual(log_weight, uniforms), len(expected)) > expected - 1 - 1e-9).all()


@given(log_weights, seeds, schemes)
def test_ancestors_ascend_exist_and_have_weight(log_weight, seed, name):
    ancestors = SCHEMES[name](log_weight, uniform_numbers(len(log_weight), seed))
    assert len(ancestors) == len(log_weight)
    assert (ancestors.diff() >= 0).all()
    assert (normalised(log_weight)[ancestors] > 0).all()


@given(st.integers(1, 200), st.floats(-5, 5), seeds, st.sampled_from(["systematic", "stratified", "residual"]))
def test_equal_weights_give_the_identity(count, level, seed, name):
    equal = torch.full((count,), level, dtype=torch.float64)
    assert SCHEMES[name](equal, uniform_numbers(count, seed)).tolist() == list(range(count))


@given(log_weights, seeds, schemes, st.integers(-20, 20))
def test_a_constant_added_to_all_log_weights_changes_nothing(log_weight, seed, name, constant):
    exact = (log_weight * 16).round() / 16  # so that the sum is exact
    uniforms = uniform_numbers(len(log_weight), seed)
    scheme = SCHEMES[name]
    assert torch.equal(scheme(exact, uniforms), scheme(exact + constant, uniforms))


@given(log_weights)
def test_the_effective_sample_size_lies_between_one_and_n(log_weight):
    assert 1 - 1e-9 <= effective_sample_size(log_weight) <= len(log_weight) + 1e-9


def test_if_no_particle_has_weight_all_have_the_same():
    nothing = torch.full((4,), -torch.inf, dtype=torch.float64)
    assert normalised(nothing).tolist() == [0.25] * 4
    assert effective_sample_size(nothing) == 4


def test_no_draw_runs_past_the_end_or_lands_on_a_weight_of_zero():
    """Ten tenths sum to less than one in float64; the last one here weighs nothing."""
    log_weight = torch.cat([torch.full((10,), 0.1).log().double(), torch.tensor([-torch.inf], dtype=torch.float64)])
    almost_one = torch.full((11,), 1 - 2**-53, dtype=torch.float64)
    assert cumulative(normalised(log_weight))[-2:].tolist() == [1.0, 1.0]
    assert multinomial(log_weight, almost_one).tolist() == [9] * 11
    assert int(draw(log_weight[None], almost_one[:1])) == 9


def test_draw_follows_the_softmax_in_every_chain():
    values = torch.tensor([[0.0, 1.0, -1.0], [2.0, 2.0, -torch.inf]], dtype=torch.float64)
    drawn = draw(values.repeat(20000, 1), uniform_numbers(40000, seed=0)).reshape(20000, 2)
    shares = torch.stack([(drawn == index).double().mean(dim=0) for index in range(3)], dim=1)
    assert (shares - values.softmax(dim=-1)).abs().max() < 4 * (0.25 / 20000) ** 0.5


def test_choices_by_reward_keep_the_earlier_of_equals():
    rewards = torch.tensor([1.0, 3.0, 3.0, -torch.inf, 2.0], dtype=torch.float64)
    assert top(rewards, 3).tolist() == [1, 2, 4]
    assert best_of_each(torch.tensor([[1.0, 1.0], [0.0, 5.0]], dtype=torch.float64)).tolist() == [0, 1]


def test_accept_first_takes_the_first_that_is_strictly_better():
    rewards = torch.tensor([1.0, 2.0, 5.0, 9.0], dtype=torch.float64)
    assert accept_first(rewards, 2.0) == 2
    assert accept_first(rewards, 0.0) == 0
    assert accept_first(rewards, 9.0) is None
