"""One meaning and one rounding rule for every budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmaccel.budgets import Tokens, check_budget, keeps_all, kept_count


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 10_000))
def test_a_fraction_is_truncated_and_keeps_at_least_one(fraction, total):
    kept = kept_count(fraction, total)
    assert 1 <= kept <= total
    assert kept == max(1, int(total * fraction))


@given(st.integers(2, 10_000), st.integers(0, 10_000))
def test_a_count_is_kept_to_the_token(count, spare):
    assert kept_count(count, count + spare) == count


def test_one_token_is_said_with_tokens():
    check_budget(Tokens(1))
    assert kept_count(Tokens(1), 576) == 1
    assert keeps_all(1.0) and not keeps_all(Tokens(1)) and not keeps_all(0.99)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (0.0, r"lies in \(0, 1\]; got 0.0.*For a number of tokens pass a whole number: budget=64"),
        (1.5, r"lies in \(0, 1\]; got 1.5"),
        (-0.1, r"lies in \(0, 1\]; got -0.1"),
        (float("nan"), r"lies in \(0, 1\]; got nan"),
        (1, r"the budget 1 could mean one token or everything; say Tokens\(1\).*1.0 for everything"),
        (0, r"whole number from 2 up; got 0"),
        (-3, r"whole number from 2 up; got -3"),
    ],
)
def test_impossible_budgets_are_refused_with_the_mend(budget, message):
    with pytest.raises(ValueError, match=message):
        check_budget(budget)


@pytest.mark.parametrize("budget", ["0.2", None, True, [0.2]])
def test_other_types_are_refused(budget):
    with pytest.raises(TypeError, match=r"a budget is a fraction in \(0, 1\], a whole number from 2 up, or Tokens"):
        check_budget(budget)


def test_more_tokens_than_exist_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"asks for 600 visual tokens, but there are only 576; pass at most 576"):
        kept_count(600, 576)


@pytest.mark.parametrize("count", [0, -1, True, 1.0])
def test_tokens_takes_whole_numbers_from_one_up(count):
    with pytest.raises(ValueError, match="a number of tokens is a whole number from 1 up; got"):
        Tokens(count)
