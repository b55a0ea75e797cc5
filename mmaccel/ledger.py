"""What a search spends: denoiser rows, decodes, reward calls.  Spent before the call, counted once, never overrun."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


class BudgetSpent(RuntimeError):
    """A call that the budget has no room for; it was not made."""


@dataclass
class Ledger:
    """The one place where calls are paid, with the seconds they took.

    limits: the most that may be spent under each name; a name without a limit is only counted.
    """

    limits: Mapping[str, int] = field(default_factory=dict)
    spent: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def left(self, name: str) -> int | None:
        """How much may still be spent under `name`; None if there is no limit."""
        return None if name not in self.limits else self.limits[name] - self.spent.get(name, 0)

    @contextmanager
    def spend(self, name: str, amount: int) -> Iterator[None]:
        """Pays `amount` under `name` for the calls in the block, and adds the seconds that they take.

        Raises BudgetSpent, before the block runs, if that is more than is left.
        """
        left = self.left(name)
        if left is not None and amount > left:
            raise BudgetSpent(
                f"{amount} {name.replace('_', ' ')} do not fit into the budget: {left} of {self.limits[name]} are left"
            )
        self.spent[name] = self.spent.get(name, 0) + amount
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
