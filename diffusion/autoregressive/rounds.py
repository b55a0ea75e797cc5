"""Speculation in rounds: the draft draws a few tokens, the target verifies them at once, row by row of the batch.

A round of a row commits the drafts up to the first that is rejected, and one token more, from the target: what replaces
that draft, or, if none is rejected, a draw of the next token.  Rows of a batch go on at their own pace.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from diffusion.autoregressive.acceptance import Rule
from diffusion.autoregressive.chains import Gaussians, Walk
from diffusion.autoregressive.origins import BONUS, KEPT, PLAIN, REDRAWN
from diffusion.autoregressive.passes import ModelRun, checked, draw
from diffusion.autoregressive.sampling import Call, draw_step
from mmaccel.reports import Report


@dataclass
class Tally:
    """What happened so far, summed over images.

    origins: [images, tokens], in the order of drawing.  turns: rounds of the whole batch.  tested: the drafts of a
    round up to the first that was rejected.  committed: tokens, by rounds.  timed: length and seconds of each turn.
    """

    origins: Int[Tensor, "images tokens"]
    turns: int = 0
    rounds: int = 0
    drafted: int = 0
    tested: int = 0
    kept: int = 0
    committed: int = 0
    timed: list[tuple[int, float]] = field(default_factory=list)

    @property
    def acceptance(self) -> float:
        """The share of tested drafts that were kept; 0 before there are any."""
        return self.kept / self.tested if self.tested else 0.0


@dataclass
class Rounds:
    """A run of speculation.  rule: the mode's.  length: of a draft, given what happened so far."""

    call: Call
    target: ModelRun
    draft: ModelRun
    rule: Rule
    length: Callable[[Tally], int]
    report: Report
    prefilled: int = 0
    tally: Tally = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.call.blank()
        images, count, _ = self.tokens.shape
        self.done = torch.full((images,), self.prefilled, device=self.tokens.device)
        self.tally = Tally(torch.full((images, count), PLAIN, device=self.tokens.device))
        self.own = self.call.randomness.beside()
        """What decides about drafts and replaces them.  Drafts use the numbers that plain generation would."""

    def __call__(self) -> Tensor:
        """All tokens, in the order of drawing, [images, tokens, size]."""
        rows = torch.arange(len(self.done), device=self.done.device)
        with self.report.phase("prefill"):
            for done in range(self.prefilled):
                draw_step(self.call, self.target, self.tokens, rows, done, 1)
        while len(rows := (self.done < self.tokens.shape[1]).nonzero()[:, 0]):
            began, length = time.perf_counter(), self.length(self.tally)
            self._round(rows, length)
            self.tally.timed.append((length, time.perf_counter() - began))
        return self.tokens

    def _round(self, rows: Tensor, longest: int) -> None:
        """One round of these rows.  The image's last token is never drafted, so that a round ends with the target."""
        done, last = self.done[rows], self.tokens.shape[1] - 1
        wanted = (last - done).clamp_max(longest)
        with self.report.phase("draft"):
            row, step, drafted, seen, q = self._drafts(rows, done, wanted)
        with self.report.phase("verify"):
            conditions = None
            if not self.shared:
                conditions = self.target.conditions(self.tokens, rows, done, wanted + 1)
            kept = torch.zeros_like(wanted)
            if drafted is not None:
                places = done[row] + step
                theirs = seen if conditions is None else conditions[:, row, step]
                verdict = self.rule.verify(drafted, self.target.law(theirs, places), q)
                stands = torch.zeros(len(rows), int(wanted.max()) + 1, dtype=torch.bool, device=rows.device)
                stands[row, step] = verdict.kept(self.own.at(rows[row]).uniform())
                kept = stands.int().cumprod(dim=1).sum(dim=1)
        free = kept == wanted
        with self.report.phase("redraw"):
            token = self.tokens[rows, done + kept]
            if bool(free.any()):
                some, place = rows[free], (done + kept)[free]
                found = self._next(self.target, some, place) if conditions is None else conditions[:, free, kept[free]]
                token[free] = self._from_target(found, some, place, drafting=longest > 0)
            if not bool(free.all()):
                turned = (~free).nonzero()[:, 0]
                number = torch.zeros_like(stands, dtype=torch.long)
                number[row, step] = torch.arange(len(row), device=rows.device)
                chosen = number[turned, kept[turned]]
                token[turned] = checked(verdict.redraw(chosen, self.own.at(rows[turned])))
        self.tokens[rows, done + kept] = token
        self.done[rows] = done + kept + 1
        self._note(rows, done, wanted, kept)

    @property
    def shared(self) -> bool:
        """Whether draft and target read the same conditions."""
        return self.draft.trunk is self.target

    def _for_draft(self, conditions: Tensor) -> Tensor:
        return conditions[: self.draft.branches] if self.shared else conditions

    def _next(self, run: ModelRun, rows: Tensor, place: Tensor) -> Tensor:
        return run.conditions(self.tokens, rows, place, torch.ones_like(place))[:, :, 0]

    def _from_target(self, conditions: Tensor, rows: Tensor, place: Tensor, drafting: bool) -> Tensor:
        """The next token of rows whose drafts all stand; plain where nothing is drafted."""

        def of_draft() -> Any:
            mine = conditions if self.shared else self._next(self.draft, rows, place)
            return self.draft.law(self._for_draft(mine), place)

        p, first = self.target.law(conditions, place), self.call.randomness.at(rows)
        return self.rule.draw(p, of_draft, first, self.own.at(rows)) if drafting else draw(p, first)

    def _drafts(self, rows: Tensor, done: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Any, Any, Any]:
        """Drafts into `tokens`: of each its row in `rows`, its step, what its rule knows; their conditions and law."""
        found: list[tuple[Tensor, Tensor, Any, Tensor]] = []
        for step in range(int(wanted.max())):
            still = (wanted > step).nonzero()[:, 0]
            some, place = rows[still], done[still] + step
            conditions = self._next(self.target if self.shared else self.draft, some, place)
            law = self.draft.law(self._for_draft(conditions), place)
            made = self.rule.draft(law, self.call.randomness.at(some))
            self.tokens[some, place] = checked(made.token)
            found.append((still, torch.full_like(still, step), made, conditions))
        if not found:
            none = rows[:0]
            return none, none, None, None, None
        stills, steps, drafted, seen = zip(*found, strict=True)
        row, step_of, conditions = torch.cat(stills), torch.cat(steps), torch.cat(seen, dim=1)
        if len(found) > 1:
            law = self.draft.law(self._for_draft(conditions), done[row] + step_of)
        return row, step_of, joined(drafted), conditions, law

    def _note(self, rows: Tensor, done: Tensor, wanted: Tensor, kept: Tensor) -> None:
        tally = self.tally
        tally.turns += 1
        tally.rounds += len(rows)
        tally.drafted += int(wanted.sum())
        tally.kept += int(kept.sum())
        tally.tested += int((kept + (kept < wanted)).sum())
        tally.committed += int((kept + 1).sum())
        place = torch.arange(self.tokens.shape[1], device=rows.device)
        end = (done + kept)[:, None]
        final = torch.where(kept < wanted, REDRAWN, torch.where(wanted > 0, BONUS, PLAIN))[:, None]
        origins = torch.where((place >= done[:, None]) & (place < end), KEPT, tally.origins[rows])
        tally.origins[rows] = torch.where(place == end, final, origins)


def joined(parts: tuple[Any, ...]) -> Any:
    """Drafts of several steps as one batch of candidates."""
    if not isinstance(parts[0], Walk):
        return type(parts[0])(torch.cat([part.token for part in parts]))
    mean, std = (torch.cat([getattr(part.laws, name) for part in parts], dim=1) for name in ("mean", "std"))
    return Walk(torch.cat([part.states for part in parts], dim=1), Gaussians(mean, std))
