"""What a run of speculation reports."""

from __future__ import annotations

import functools
import time
from dataclasses import replace

import torch

from diffusion.autoregressive.lengths import tokens_a_round
from diffusion.autoregressive.rounds import Tally
from diffusion.autoregressive.sampling import Call, plain_tokens
from mmaccel.ledger import Ledger
from mmaccel.reports import Report


def fill(report: Report, call: Call, ledger: Ledger, tally: Tally, seconds: float) -> None:
    """Writes the figures of a finished run.

    acceptance: of the drafts that were tested, up to the first rejection of each round.  Calls are counted, with those
    of plain generation beside them; the two speed-ups time a plain run of the same call when somebody reads them.
    predicted_speed_up: what this acceptance allows at the measured times of prefill and rounds.
    """
    config, images = call.model.config, len(call.labels)
    steps = (call.sampling.diffusion_steps or config.diffusion_steps) if config.head == "diffusion" else 0
    report.record("acceptance", tally.acceptance)
    report.record("tokens_a_round", tally.committed / tally.rounds if tally.rounds else 1.0)
    report.record("rounds", tally.rounds)
    report.record("drafts_a_round", tally.drafted / tally.rounds if tally.rounds else 0.0)
    for name in ("target_backbone_calls", "target_head_calls"):
        dense = config.tokens * (1 if "backbone" in name else steps)
        report.record(name, ledger.spent.get(name, 0), dense)
    for name in ("draft_backbone_calls", "draft_head_calls", "proposals"):
        report.record(name, ledger.spent.get(name, 0))
    report.facts["rows"] = {name: rows for name, rows in sorted(ledger.spent.items()) if name.endswith("_rows")}

    @functools.cache
    def plain_seconds() -> float:
        generators = tuple(torch.Generator(one.device).manual_seed(0) for one in call.randomness.generators)
        again = replace(call, randomness=replace(call.randomness, generators=generators))
        began = time.perf_counter()
        with torch.no_grad():
            plain_tokens(again, again.run(call.model, "target", Ledger()))
        return time.perf_counter() - began

    def predicted() -> float:
        """Rows of a batch share the calls of a turn, so its time counts once."""
        if not tally.drafted:
            return 1.0
        expected = tokens_a_round(tally.acceptance, tally.drafted / tally.rounds)
        turn = sum(report.seconds.get(phase, 0.0) for phase in ("draft", "verify", "redraw")) / tally.turns
        turns = tally.committed / images / expected
        return plain_seconds() / (report.seconds["prefill"] + turns * turn)

    report.record("seconds", seconds, plain_seconds, "s")
    report.record("speed_up", lambda: plain_seconds() / seconds)
    report.record("predicted_speed_up", predicted)
    spatial = torch.zeros_like(tally.origins).scatter(1, call.order, tally.origins).cpu()
    report.details["origins"] = spatial.reshape(images, config.grid, config.grid)
