"""How many tokens to draft: what speculation yields, and the length that yields most."""

from __future__ import annotations

import numpy as np

from diffusion.autoregressive.rounds import Tally

FIRST, MOST = (4, 1, 4, 1), 16


def tokens_a_round(acceptance: float, length: float) -> float:
    """The expected tokens that a round commits if every draft is kept with the same probability, in any order.

    (1 - a^(length + 1)) / (1 - a): the drafts up to the first rejection, and one more.  A length between two whole
    numbers is a mean: of rounds of these two.
    Source: Leviathan et al. 2023, arXiv:2211.17192, equation 1.
    """
    whole = int(length)
    return sum(acceptance**kept for kept in range(whole + 1)) + (length - whole) * acceptance ** (whole + 1)


def best_length(tally: Tally, plain: float | None) -> int:
    """The length that commits most tokens a second, by the acceptance and the times of a run so far.

    A round is taken to cost something, and something more a draft: a line through the rounds so far, of which the first
    try the lengths of `FIRST`.  plain: seconds of a token without drafts, if known; where that pays more, it is 0.
    The choice depends on earlier rounds alone, so it changes no distribution; it depends on the clock, so a seed need
    not give the same image again.
    """
    if len(tally.timed) < len(FIRST):
        return FIRST[len(tally.timed)]
    lengths, seconds = np.array(tally.timed).T
    each = 0.0
    if lengths.std() > 0:
        each = max(0.0, float(np.cov(lengths, seconds)[0, 1] / lengths.var(ddof=1)))
    once = max(1e-9, float(seconds.mean() - each * lengths.mean()))
    rates = {n: tokens_a_round(tally.acceptance, n) / (once + n * each) for n in range(1, MOST + 1)}
    if plain:
        rates[0] = 1 / plain
    return max(rates, key=lambda n: rates[n])
