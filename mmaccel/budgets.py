"""How much to keep: one meaning and one rounding rule for every budget of every method."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tokens:
    """A budget of `count` tokens; the way to say "exactly one", which a bare 1 does not (is it 1 or 100 %?)."""

    count: int

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"a number of tokens is a whole number from 1 up; got {self.count!r}")


Budget = int | float | Tokens
"""A float is a fraction in (0, 1], a whole number from 2 up is a count, `Tokens(1)` is one token."""


def check_budget(budget: object) -> None:
    """Raises TypeError or ValueError, with the mend, unless `budget` is a `Budget`."""
    if isinstance(budget, Tokens):
        return
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(
            f"a budget is a fraction in (0, 1], a whole number from 2 up, or Tokens(n); got {budget!r} "
            f"of type {type(budget).__name__}"
        )
    if isinstance(budget, int):
        if budget == 1:
            raise ValueError(
                "the budget 1 could mean one token or everything; say Tokens(1) (in a recipe: {count: 1}) for one "
                "token, 1.0 for everything"
            )
        if budget < 1:
            raise ValueError(f"a budget counted in tokens is a whole number from 2 up; got {budget!r}")
    elif not 0 < budget <= 1:
        raise ValueError(
            f"the fraction of visual tokens to keep lies in (0, 1]; got {budget!r}. "
            "For a number of tokens pass a whole number: budget=64"
        )


def kept_count(budget: Budget, total: int) -> int:
    """The number of tokens that `budget` keeps of `total`.

    A fraction is truncated, as int(total * budget) in floating point (what the papers' codes compute), but at least
    one token stays.  Raises ValueError if a count asks for more tokens than exist.
    """
    if isinstance(budget, float):
        return min(total, max(1, int(total * budget)))
    count = budget.count if isinstance(budget, Tokens) else budget
    if count > total:
        raise ValueError(
            f"the budget asks for {count} visual tokens, but there are only {total}; pass at most {total}, "
            "or a fraction in (0, 1]"
        )
    return count


def keeps_all(budget: object) -> bool:
    """Whether `budget` is the fraction 1.0, at which every method is the dense model."""
    return isinstance(budget, float) and budget == 1.0
