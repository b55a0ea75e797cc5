"""Denoising trajectories verified step by step, so that a rejected draft costs no trajectory of the target.

A token's trajectory is a sequence of Gaussian steps, and a draft of it a draft of that sequence.  Block verification
(Sun et al. 2024, "Block Verification Accelerates Speculative Decoding", arXiv:2403.10444, algorithm 2) says how many of
its steps stand, so that the sequence follows the target's law: no rule keeps more of them.  Where it stops, the next
step is drawn from what the target's law has more than the draft's, and the draft goes on from there.
With steps for words it is ours, and so is the closed form of the excess, for which both models' steps need the same
standard deviation, as heads of a fixed variance have it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from diffusion.autoregressive.acceptance import Rule, Verdict, drawn, residual, settle
from diffusion.autoregressive.chains import Chain, Draws, Gaussians, Walk, reread, sweep_on, walk, walk_on
from diffusion.autoregressive.passes import checked
from mmaccel.ledger import Ledger

PROPOSALS = 64  # of one step, at first: they call no network


@dataclass(frozen=True)
class Compared:
    """Drafted trajectories, and what the target says of them.

    p, q: the laws of the target's and the draft's steps, at the draft's states.
    log_weights: how much of the target's law is left, before each step and behind the last, with 1 at first (the
    logarithm of p_i in algorithm 2).
    excess: of that law over the draft's, the mass in each step.
    """

    states: Float[Tensor, "levels rows size"]
    p: Gaussians
    q: Gaussians
    log_weights: Float64[Tensor, "levels rows"]
    excess: Float64[Tensor, "steps rows"]

    def last_standing(self, uniforms: Float64[Tensor, "rows"]) -> Int[Tensor, "rows"]:
        """How many steps stand, if not all do: the most that have a chance and take it, h_i in algorithm 2."""
        chances = (self.excess / (self.excess - torch.expm1(self.log_weights[:-1]))).nan_to_num(0.0)
        none_behind = (1 - chances).flip(0).cumprod(0).flip(0)
        number = torch.arange(len(chances), device=chances.device)[:, None]
        return torch.where(uniforms < 1 - none_behind, number, 0).amax(dim=0)

    def turned(
        self, rows: Int[Tensor, "chosen"], draws: Draws, ledger: Ledger
    ) -> tuple[Float[Tensor, "chosen size"], Int[Tensor, "chosen"]]:
        """For rows that are not kept: the state after the step that replaces the first rejected one, and its number."""
        at = self.at(rows).last_standing(draws.uniform())
        p, q, left = _step(self.p, at, rows), _step(self.q, at, rows), self.log_weights[at, rows]

        def propose(chosen: Tensor, stream: Draws) -> tuple[Tensor, Tensor]:
            made = drawn(p.at(chosen), stream)
            return made, -log_ratio(made, p.at(chosen), q.at(chosen))[0] - left[chosen]

        state = residual(propose, torch.arange(len(rows), device=rows.device), draws, ledger, PROPOSALS)
        return state, at + 1

    def at(self, rows: Int[Tensor, "chosen"]) -> Compared:
        """The chosen trajectories."""
        return Compared(
            self.states[:, rows], self.p.at(rows), self.q.at(rows), self.log_weights[:, rows], self.excess[:, rows]
        )


def compare(drafted: Walk, p: Gaussians, begun: Bool[Tensor, "steps rows"] | None = None) -> Compared:
    """What the target's laws p of all steps, at the draft's states, say of a draft.

    begun: which steps are the draft's; those before them stand.
    """
    q = drafted.laws
    ratio, apart = log_ratio(drafted.states[1:], p, q)
    if begun is not None:
        ratio, apart = ratio * begun, apart * begun
    total = torch.cat([torch.zeros_like(ratio[:1]), ratio.cumsum(0)])
    left = total - total.cummax(dim=0).values
    return Compared(drafted.states, p, q, left, excess_of(left[:-1], apart))


def log_ratio(
    value: Float[Tensor, "*batch size"], p: Gaussians, q: Gaussians
) -> tuple[Float64[Tensor, "*batch"], Float64[Tensor, "*batch"]]:
    """log p(value)/q(value) for Gaussians of one std, and how many stds their means lie apart."""
    above, below, std = p.mean.double(), q.mean.double(), p.std.double()
    apart = (above - below) / std
    return (apart * (value.double() - (above + below) / 2) / std).sum(dim=-1), apart.norm(dim=-1)


def excess_of(log_weight: Float64[Tensor, "*batch"], apart: Float64[Tensor, "*batch"]) -> Float64[Tensor, "*batch"]:
    """The integral of max(0, weight p - q) for Gaussians p, q of one std whose means lie so many stds apart."""
    apart = apart.clamp_min(torch.finfo(apart.dtype).tiny)
    middle, half = log_weight / apart, apart / 2
    above: Tensor = log_weight.exp() * torch.special.ndtr(middle + half) - torch.special.ndtr(middle - half)
    return above.clamp_min(0)


@dataclass(frozen=True)
class StepRule(Rule):
    """The whole denoising trajectory is drafted, and as many of its steps are kept as can be; exact.

    The draft needs one batched call of the target.  A rejected one goes on behind the steps that stand, drafted and
    verified again, until the trajectory has reached its end.
    sweeps: in how many calls of the draft's head, and one more, all steps are drafted at once, see `chains.sweep_on`;
    None, or as many as there are steps, drafts them one after the other.
    """

    ledger: Ledger
    sweeps: int | None = None

    def draft(self, q: Chain, draws: Draws) -> Walk:
        if self.sweeps is None or self.sweeps >= q.steps:
            return walk(q, draws)
        numbers = [draws.normal(q.size) for _ in range(1 + q.steps)]
        start = numbers[0]
        at = torch.zeros(len(start), dtype=torch.long, device=start.device)
        return sweep_on(q, start, at, torch.stack(numbers[1:]), self.sweeps)

    def verify(self, drafted: Walk, p: Chain, q: Chain) -> Verdict:
        found = compare(drafted, reread(p, drafted.states))

        def redraw(chosen: Tensor, draws: Draws) -> Tensor:
            state, at = found.turned(chosen, draws, self.ledger)
            return self.finished(p.at(chosen), q.at(chosen), state, at, draws)

        return Verdict(found.log_weights[-1], redraw)

    def draw(self, p: Chain, q: Callable[[], Chain], first: Draws, draws: Draws) -> Float[Tensor, "rows size"]:
        """Through drafts, which saves calls of the target's head."""
        law = q()
        drafted = self.draft(law, first)
        token, _ = settle(self.verify(drafted, p, law), drafted.token, draws.uniform(), draws)
        return checked(token)

    def finished(
        self, p: Chain, q: Chain, state: Float[Tensor, "rows size"], at: Int[Tensor, "rows"], draws: Draws
    ) -> Float[Tensor, "rows size"]:
        """Where trajectories end that stand in these states after so many steps of the target's."""
        state, at, waiting = state.clone(), at.clone(), torch.arange(len(state), device=state.device)
        while len(waiting := waiting[at[waiting] < p.steps]):
            some, stream = at[waiting], draws.at(waiting)
            first = int(some.min())
            drafted = self._on(q.at(waiting), state[waiting], some, stream)
            indices = torch.arange(p.steps - 1 - first, -1, -1)
            number = torch.arange(first, p.steps, device=some.device)[:, None]
            found = compare(drafted, p.at(waiting)(drafted.states[:-1], indices), number >= some)
            state[waiting], at[waiting] = drafted.token, p.steps
            refused = (stream.uniform().log() >= found.log_weights[-1]).nonzero()[:, 0]
            if len(refused):
                turned, step = found.turned(refused, stream.at(refused), self.ledger)
                state[waiting[refused]], at[waiting[refused]] = turned, first + step
        return state

    def _on(self, q: Chain, state: Tensor, at: Tensor, draws: Draws) -> Walk:
        noise = draws.normal(q.steps, q.size).transpose(0, 1).to(state)
        if self.sweeps is None or self.sweeps >= q.steps - int(at.min()):
            return walk_on(q, state, at, noise)
        return sweep_on(q, state, at, noise, self.sweeps)


def _step(laws: Gaussians, step: Tensor, rows: Tensor) -> Gaussians:
    return Gaussians(laws.mean[step, rows], laws.std[step, rows])
