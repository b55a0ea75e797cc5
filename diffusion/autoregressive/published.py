"""The loop of the released code of arXiv:2411.11925, for parity.  Not lossless, whatever its acceptance test does.

It verifies a block of drafts by conditions that see nothing of the block, tests every draft for itself, and goes on
with what was drafted after a rejected one.  So its cost does not depend on what is kept, and its factorisation is that
of the target in fewer steps.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from diffusion.autoregressive.acceptance import Rule, settle
from diffusion.autoregressive.origins import KEPT, PLAIN, REDRAWN
from diffusion.autoregressive.passes import ModelRun, checked
from diffusion.autoregressive.rounds import Tally, joined
from diffusion.autoregressive.sampling import Call, draw_step
from mmaccel.reports import Report


def published_tokens(
    call: Call, target: ModelRun, draft: ModelRun, rule: Rule, length: int, prefill: float, report: Report
) -> tuple[Tensor, Tally]:
    """All tokens, in the order of drawing, [images, tokens, size].

    Steps up to prefill x tokens are the target's.  Drafts are verified at every step that is a multiple of `length`,
    so that the first block may be shorter, and at the last.
    """
    tokens, own = call.blank(), call.randomness.beside()
    images, count, _ = tokens.shape
    rows, ones = torch.arange(images, device=tokens.device), torch.ones(images, dtype=torch.long, device=tokens.device)
    tally = Tally(torch.full((images, count), PLAIN, device=tokens.device))
    block: list[tuple[Any, Tensor]] = []
    for step in range(count):
        if step <= prefill * count:
            with report.phase("prefill"):
                draw_step(call, target, tokens, rows, step, 1)
            continue
        with report.phase("draft"):
            conditions = draft.conditions(tokens, rows, step * ones, ones)[:, :, 0]
            made = rule.draft(draft.law(conditions, step * ones), call.randomness.at(rows))
            tokens[:, step] = checked(made.token)
            block.append((made, conditions))
        if step % length and step + 1 < count:
            continue
        with report.phase("verify"):
            start = step + 1 - len(block)
            places = torch.arange(start, step + 1, device=tokens.device).repeat_interleave(images)
            seen = rearrange(
                target.conditions_together(tokens, rows, start, len(block)),
                "branches rows n width -> branches (n rows) width",
            )
            q = draft.law(torch.cat([conditions for _, conditions in block], dim=1), places)
            drafted = joined(tuple(made for made, _ in block))
            verdict = rule.verify(drafted, target.law(seen, places), q)
            draws = own.at(rows.repeat(len(block)))
            settled, kept = settle(verdict, drafted.token, draws.uniform(), draws)
            tokens[:, start : step + 1] = rearrange(checked(settled), "(n rows) size -> rows n size", rows=images)
        tally.turns, tally.rounds, tally.kept = tally.turns + 1, tally.rounds + images, tally.kept + int(kept.sum())
        tally.drafted = tally.tested = tally.committed = tally.committed + len(kept)
        tally.origins[:, start : step + 1] = torch.where(
            rearrange(kept, "(n rows) -> rows n", rows=images), KEPT, REDRAWN
        )
        block = []
    return tokens, tally
