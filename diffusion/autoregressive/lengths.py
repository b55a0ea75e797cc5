"""How many tokens to draft: what speculation yields, and the length that yields most."""

from __future__ import annotations

from collections.abc import Mapping

from diffusion.autoregressive.rounds import Tally

FIRST, MOST = 4, 16


def tokens_a_round(acceptance: float, length: float) -> float:
    """The expected tokens that a round commits if every draft is kept with the same probability, in any order.

    (1 - a^(length + 1)) / (1 - a): the drafts up to the first rejection, and one more.  A length between two whole
    numbers is a mean: of rounds of these two.
    Source: Leviathan et al. 2023, arXiv:2211.17192, equation 1.
    """
    whole = int(length)
    return sum(acceptance**kept for kept in range(whole + 1)) + (length - whole) * acceptance ** (whole + 1)


def best_length(tally: Tally, seconds: Mapping[str, float]) -> int:
    """The length that commits most tokens a second, by the acceptance and the times of a run so far.

    A round is taken to cost its drafts, and once verifying and redrawing.  The choice depends on earlier rounds alone,
    so it changes no distribution; it depends on the clock, so a seed need not give the same image again.
    """
    if not tally.rounds or not tally.drafted:
        return FIRST
    draft = seconds["draft"] / tally.drafted
    rest = (seconds["verify"] + seconds["redraw"]) / tally.rounds
    return max(range(1, MOST + 1), key=lambda n: tokens_a_round(tally.acceptance, n) / (n * draft + rest))
