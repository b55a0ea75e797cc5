"""Which drafted tokens stand, and what stands in the place of the first that does not: the rules of all modes.

A rule compares what the draft model q drew with the target's law p.  Candidates are rows: each is one drafted token,
given everything that was drafted before it.  For the exact rules the law of what comes out is p's: a draft y ~ q is
kept with probability min(1, p(y)/q(y)), and otherwise replaced by a draw from the law proportional to max(0, p - q).
This holds conditionally on anything that the draft's remaining randomness does not depend on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from diffusion.autoregressive.chains import Chain, Draws, Gaussians, Walk, log_density, same_noise, walk
from diffusion.autoregressive.mixtures import MixtureLaw
from diffusion.autoregressive.passes import draw
from mmaccel.ledger import Ledger

FIRST_PROPOSALS, MOST_AT_ONCE, GIVEN_UP = 4, 1024, 1_000_000
"""How many proposals a rejected token gets at first, at once, and before it counts as a mistake."""


class Drafted(Protocol):
    """One token a row, and what its rule needs to know of how it was drawn."""

    @property
    def token(self) -> Tensor: ...


@dataclass(frozen=True)
class Verdict:
    """What a rule says of its candidates.

    log_ratio: the log of the probability to be kept, where it is below 0; -inf is never, 0 and above always.
    redraw: what stands in the place of the chosen candidates, given that they are not kept.
    """

    log_ratio: Float64[Tensor, "candidates"]
    redraw: Callable[[Int[Tensor, "chosen"], Draws], Float[Tensor, "chosen size"]]

    def kept(self, uniforms: Float64[Tensor, "candidates"]) -> Bool[Tensor, "candidates"]:
        """Which candidates stand.  Raises ValueError if a ratio is no number."""
        if bool(self.log_ratio.isnan().any()):
            raise ValueError(
                "a density ratio of draft and target is no number: one of their heads gives NaN. Run both models in "
                "float32, and plain generation of each first"
            )
        return uniforms.log() < self.log_ratio


class Rule(ABC):
    """How one mode drafts and verifies.  p, q: `Chain` or `MixtureLaw`, as the mode needs."""

    @abstractmethod
    def draft(self, q: Any, draws: Draws) -> Any:
        """One token a row, drawn from the draft's law."""

    @abstractmethod
    def verify(self, drafted: Any, p: Any, q: Any) -> Verdict:
        """Compares drafts with the target."""

    def draw(self, p: Any, q: Callable[[], Any], first: Draws, draws: Draws) -> Float[Tensor, "rows size"]:
        """One token a row of the target's law, behind drafts that all stand: as plain generation would draw it.

        q: makes the draft's law, for rules to which a token through a draft costs less.  first: plain generation's
        numbers; draws: others.
        """
        return draw(p, first)


@dataclass(frozen=True)
class TrajectoryRule(Rule):
    """The whole denoising trajectory (x_T, ..., x_0) is the object that is drafted and kept; exact.

    For heads that learn their variance; with a fixed one, `stepwise.StepRule` has the same law and costs less.
    log p/q sums over all steps, both laws taken at the draft's states, so that the target needs one batched call.  A
    rejected token costs target trajectories, on average one a tested token, whatever the acceptance.
    Ours; no such mode was published.  Its marginal of x_0 is the target's as its law of trajectories is.
    """

    ledger: Ledger

    def draft(self, q: Chain, draws: Draws) -> Walk:
        return walk(q, draws)

    def verify(self, drafted: Walk, p: Chain, q: Chain) -> Verdict:
        def propose(chosen: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
            made = walk(p.at(chosen), draws)
            return made.token, log_density(q.at(chosen), made.states) - made.log_density()

        def redraw(chosen: Tensor, draws: Draws) -> Tensor:
            return residual(propose, chosen, draws, self.ledger)

        return Verdict(log_density(p, drafted.states) - drafted.log_density(), redraw)


@dataclass(frozen=True)
class LastStepRule(Rule):
    """Both models run on the same noise, and only the last step is compared; exact, of low acceptance.

    Given x_T and all noise but the last, x_0 is Gaussian under both, on the paths that each model takes.  Equation 7 of
    arXiv:2411.11925 without its factor Sigma, which breaks exactness.
    """

    ledger: Ledger

    def draft(self, q: Chain, draws: Draws) -> Walk:
        return walk(q, draws)

    def verify(self, drafted: Walk, p: Chain, q: Chain) -> Verdict:
        mine, theirs = same_noise(p, drafted).last, drafted.last

        def propose(chosen: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
            token = drawn(mine.at(chosen), draws)
            return token, theirs.at(chosen).log_density(token) - mine.at(chosen).log_density(token)

        def redraw(chosen: Tensor, draws: Draws) -> Tensor:
            return residual(propose, chosen, draws, self.ledger)

        return Verdict(mine.log_density(drafted.token) - theirs.log_density(drafted.token), redraw)


@dataclass(frozen=True)
class Value:
    """A token, however it was drawn."""

    token: Float[Tensor, "rows size"]


@dataclass(frozen=True)
class MixtureRule(Rule):
    """Gaussian mixtures: the densities of tokens in closed form; exact, and of the highest acceptance that there is."""

    ledger: Ledger

    def draft(self, q: MixtureLaw, draws: Draws) -> Value:
        return Value(q.draw(draws))

    def verify(self, drafted: Value, p: MixtureLaw, q: MixtureLaw) -> Verdict:
        def propose(chosen: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
            token = p.at(chosen).draw(draws)
            return token, q.at(chosen).log_density(token) - p.at(chosen).log_density(token)

        def redraw(chosen: Tensor, draws: Draws) -> Tensor:
            return residual(propose, chosen, draws, self.ledger)

        return Verdict(p.log_density(drafted.token) - q.log_density(drafted.token), redraw)


@dataclass(frozen=True)
class BoundedRule(Rule):
    """Keeps a draft within the Euclidean distance tau of the target's token of the same noise, which stands otherwise.

    The target's token of fresh noise is an exact sample, so each token is within tau of one, given those before it.
    With tau = 0 it is one.
    """

    tau: float

    def draft(self, q: Chain, draws: Draws) -> Walk:
        return walk(q, draws)

    def verify(self, drafted: Walk, p: Chain, q: Chain) -> Verdict:
        mine = same_noise(p, drafted).token
        near = (mine - drafted.token).norm(dim=-1) <= self.tau
        never = torch.full(near.shape, -torch.inf, dtype=torch.float64, device=near.device)
        return Verdict(torch.where(near, 0.0, never), lambda chosen, draws: mine[chosen])


@dataclass(frozen=True)
class PublishedRule(Rule):
    """The rule of the released code of arXiv:2411.11925; not lossless.

    The ratio of the last step's densities times prod s_p/s_q of the others (the inverse of the paper's Sigma), with the
    squares divided by `softening`^2.  What replaces a rejected token is drawn from the unsoftened excess.
    Differs from the release in going on until a proposal passes; there, tokens are zeros after 100 attempts.
    """

    softening: float
    ledger: Ledger

    def draft(self, q: Chain, draws: Draws) -> Walk:
        return walk(q, draws)

    def verify(self, drafted: Walk, p: Chain, q: Chain) -> Verdict:
        aligned = same_noise(p, drafted)
        return self.compare(drafted.token, aligned.last, drafted.last, _log_stds(aligned) - _log_stds(drafted))

    def compare(self, token: Tensor, p: Gaussians, q: Gaussians, log_sigma: Tensor) -> Verdict:
        """The verdict from the last step's laws and log_sigma = log prod s_p/s_q over the steps before it."""
        squares = _squares(q, token) - _squares(p, token)
        ratio = squares / self.softening**2 + (q.std.double().log() - p.std.double().log()).sum(-1) + log_sigma

        def propose(chosen: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
            made = drawn(p.at(chosen), draws)
            return made, published_ratio(made, p.at(chosen), q.at(chosen), log_sigma[chosen])

        def redraw(chosen: Tensor, draws: Draws) -> Tensor:
            return residual(propose, chosen, draws, self.ledger)

        return Verdict(ratio, redraw)


def published_ratio(
    token: Float[Tensor, "rows size"], p: Gaussians, q: Gaussians, log_sigma: Float64[Tensor, "rows"]
) -> Float64[Tensor, "rows"]:
    """log q / (Sigma p) of proposals, with the released Sigma."""
    return q.log_density(token) - p.log_density(token) - log_sigma


def residual(
    propose: Callable[[Tensor, Draws], tuple[Tensor, Tensor]],
    chosen: Int[Tensor, "chosen"],
    draws: Draws,
    ledger: Ledger,
    many: int = FIRST_PROPOSALS,
) -> Float[Tensor, "chosen size"]:
    """Draws from max(0, p - q), normalised, for every chosen candidate, by proposals from p.

    propose: draws of candidates, that may repeat, and log q/p of each, [m, size] and [m].  A proposal passes with
    probability max(0, 1 - q/p).  many: proposals at first; there is no bound on them that would change the law: their
    number doubles until every candidate has one that passes.  Raises RuntimeError if none of a million does, as when
    q >= p everywhere up to rounding, where no draft should have been rejected.
    """
    found: Tensor | None = None
    waiting = torch.arange(len(chosen), device=chosen.device)
    tried = 0
    while len(waiting):
        if tried >= GIVEN_UP:
            raise RuntimeError(
                f"{len(waiting)} rejected tokens found no replacement in {tried} proposals: draft and target agree to "
                "within rounding, yet a draft was rejected. Run them in float64, or without the draft"
            )
        repeated = waiting.repeat_interleave(many)
        with ledger.spend("proposals", len(repeated)):
            tokens, log_ratio = propose(chosen[repeated], draws.at(repeated))
            passed = draws.at(repeated).uniform().to(log_ratio) < -torch.expm1(log_ratio.clamp_max(0))
        if found is None:
            found = tokens.new_empty(len(chosen), tokens.shape[-1])
        passed = passed.reshape(len(waiting), many)
        hit, first = passed.any(dim=1), passed.int().argmax(dim=1)
        found[waiting[hit]] = tokens.reshape(len(waiting), many, -1)[hit, first[hit]]
        waiting, tried = waiting[~hit], tried + many
        many = min(2 * many, MOST_AT_ONCE)
    assert found is not None, "nothing was chosen"
    return found


def settle(
    verdict: Verdict, drafted: Tensor, uniforms: Tensor, draws: Draws
) -> tuple[Float[Tensor, "candidates size"], Bool[Tensor, "candidates"]]:
    """Every candidate for itself: the draft where it is kept, else what replaces it; and which were kept."""
    kept = verdict.kept(uniforms)
    chosen = (~kept).nonzero()[:, 0]
    tokens = drafted.clone()
    if len(chosen):
        tokens[chosen] = verdict.redraw(chosen, draws.at(chosen))
    return tokens, kept


def drawn(law: Gaussians, draws: Draws) -> Tensor:
    """One vector of each law."""
    return law.mean + law.std * draws.normal(law.mean.shape[-1]).to(law.mean)


def _squares(law: Gaussians, value: Tensor) -> Tensor:
    return (((value.double() - law.mean.double()) / law.std.double()) ** 2).sum(-1) / 2


def _log_stds(walked: Walk) -> Tensor:
    return walked.laws.std[:-1].double().log().sum((0, -1))
