"""How long pictures take: plain, with speculation, and, for continuous tokens, by the draft alone, taking turns."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import mmaccel
from diffusion.autoregressive.jacobi import SpeculativeJacobi
from diffusion.autoregressive.lengths import tokens_a_round
from diffusion.autoregressive.modeling import MARModel
from diffusion.autoregressive.painters import ContinuousPainter, DiscretePainter, Painter
from diffusion.autoregressive.speculation import ContinuousSpeculation
from mmaccel.bench import Figure, Progress, Samples, interleave, mean, median, median_ratio, silent
from mmaccel.bench_rows import Row
from mmaccel.methods import Method

REPORTED = (
    "acceptance",
    "tokens_a_round",
    "drafts_a_round",
    "rounds",
    "proposals",
    "passes",
    "tokens_a_pass",
    "missing",
)
"""What a turn says beside its seconds, where the method reports it."""


def measure(
    painter: Painter,
    methods: Mapping[str, Method],
    batches: Sequence[int],
    rounds: int,
    call: Mapping[str, Any],
    progress: Progress = silent,
) -> list[Row]:
    """A row a setting and batch: figures of every turn.  call: settings of `generate`.

    All settings of a turn draw the same labels.  Rows of "gumbel" settings say how many tokens differ from plain
    decoding with the same noise.
    """
    rows: list[Row] = []
    for batch in batches:
        runs: dict[str, Callable[[], Mapping[str, float]]] = {"plain": Turns(painter, None, batch, call)}
        runs |= {name: Turns(painter, method, batch, call) for name, method in methods.items()}
        if isinstance(painter, ContinuousPainter) and painter.draft is not None:
            runs["draft"] = Turns(ContinuousPainter(alone(painter.draft, painter.model), None, None), None, batch, call)
        found = interleave(runs, rounds, progress=progress)
        for name, quantities in found.items():
            row = {"setting": name, "batch": batch, **{key: values.tolist() for key, values in quantities.items()}}
            method = methods.get(name)
            if isinstance(method, ContinuousSpeculation) and method.mode != "published":  # it goes on behind rejections
                assert isinstance(painter, ContinuousPainter)
                row |= compute(painter, method, batch, quantities, call)
            rows.append(row)
        for name, method in methods.items():
            if isinstance(method, SpeculativeJacobi) and method.redraw == "gumbel":
                assert isinstance(painter, DiscretePainter)
                next(row for row in rows if row["batch"] == batch and row["setting"] == name)["different"] = [
                    different(painter, method, batch, seed) for seed in range(min(rounds, 3))
                ]
    return rows


def alone(draft: MARModel, target: MARModel) -> MARModel:
    """The draft as a model that draws: with the target's backbone, if it has none of its own."""
    if draft.backbone is not None:
        return draft
    config = copy.deepcopy(target.config)
    config.head_width, config.head_layers = draft.config.head_width, draft.config.head_layers
    whole: MARModel = MARModel(config).eval()
    whole.labels, whole.unconditional = target.labels, target.unconditional
    whole.backbone, whole.head = target.backbone, draft.head
    return whole


class Turns:
    """Pictures of one setting, other labels and another seed in every turn."""

    def __init__(self, painter: Painter, method: Method | None, batch: int, call: Mapping[str, Any]) -> None:
        self.painter, self.method, self.batch, self.call = painter, method, batch, call
        self.turn = 0

    def __call__(self) -> dict[str, float]:
        self.turn += 1
        labels = [(self.turn * self.batch + place) % self.painter.classes for place in range(self.batch)]
        if self.method is None:
            began = time.perf_counter()
            self.painter.draw(labels, self.turn, **self.call)
            return {"seconds": time.perf_counter() - began}
        with mmaccel.applied(self.painter.model, self.method) as run:
            began = time.perf_counter()
            self.painter.draw(labels, self.turn, **self.call)
            seconds = time.perf_counter() - began
        report = run.report
        return {
            "seconds": seconds,
            **{name: float(report[name]) for name in REPORTED if name in report.quantities},
            **{name: float(rows) for name, rows in report.facts.get("rows", {}).items() if name.endswith("head_rows")},
        }


def different(painter: DiscretePainter, method: SpeculativeJacobi, batch: int, seed: int) -> float:
    """The share of tokens that differ between a window and single tokens, with one noise a position."""
    labels = [(seed + place) % painter.classes for place in range(batch)]
    found = []
    for window in (method.window, 1):
        with mmaccel.applied(painter.model, SpeculativeJacobi.from_dict({**method.to_dict(), "window": window})):
            found.append(painter.draw(labels, seed))
    return float((found[0] != found[1]).double().mean())


def compute(
    painter: ContinuousPainter,
    method: ContinuousSpeculation,
    batch: int,
    quantities: Mapping[str, Samples],
    call: Mapping[str, Any],
) -> Row:
    """Facts that limits follow from: the tokens of a picture, those that the target draws first, and arithmetic.

    compute_ratio: multiplications of plain generation over those of speculation, by the rows that each part saw; the
    speed-up where a machine is busy with arithmetic alone.
    """
    model, draft = painter.model, painter.draft
    assert draft is not None
    steps = call.get("diffusion_steps") or model.config.diffusion_steps
    branches = 1 if call.get("guidance", 1.0) == 1 else 2
    tokens = int(model.config.tokens)
    prefilled = math.ceil(method.prefill * tokens)
    (backbone, head), (small_backbone, small_head) = parts(model), parts(draft)
    plain = batch * branches * tokens * (backbone + steps * head)
    rounds, drafted = quantities["rounds"], quantities["rounds"] * quantities["drafts_a_round"]
    spent = branches * (backbone * (rounds + drafted + batch * prefilled) + small_backbone * drafted)
    for weights, name in ((head, "target_head_rows"), (small_head, "draft_head_rows")):
        spent = spent + weights * quantities.get(name, np.zeros(1))
    return {"tokens": tokens, "prefilled": prefilled, "compute_ratio": (plain / spent).tolist()}


def parts(model: MARModel) -> tuple[float, float]:
    """Weights of the backbone and of the head: multiplications a row."""
    backbone, head = (
        sum(parameter.numel() for parameter in part.parameters() if parameter.ndim > 1) if part is not None else 0
        for part in (model.backbone, model.head)
    )
    return float(backbone), float(head)


def compare(rows: Sequence[Row]) -> dict[str, Figure]:
    """Figures, each named QUANTITY.SETTING.batch_SIZE; intervals are over turns.

    `seconds`: median of a turn.  `speed_up`: plain over this setting, medians.  Of continuous tokens: `acceptance`,
    `tokens_a_round`, and but for the published mode `limit`: the speed-up that this acceptance allows at the measured
    ratio of the draft's time to the target's, if verifying costs no more than a token; `of_limit`; `compute_bound`, see
    `compute`.  Of discrete tokens: `fewer_passes`: tokens a pass; `different`: the share of tokens that are not plain
    decoding's with the same noise; `missing`: of the tokens before one, the share that it was drawn without.
    """
    figures: dict[str, Figure] = {}
    of = {(row["setting"], row["batch"]): row for row in rows}
    for (name, batch), row in of.items():
        end = f"{name}.batch_{batch}"
        own, plain = (np.asarray(of[setting, batch]["seconds"]) for setting in (name, "plain"))
        figures[f"seconds.{end}"] = median(own, "s")
        if name == "plain":
            continue
        figures[f"speed_up.{end}"] = speed = median_ratio(plain, own)
        if "acceptance" in row:
            figures[f"acceptance.{end}"] = accepted = mean(row["acceptance"])
            figures[f"tokens_a_round.{end}"] = mean(row["tokens_a_round"])
        if "compute_ratio" in row:
            cost = float(np.median(of["draft", batch]["seconds"]) / np.median(plain))
            length = float(np.mean(row["drafts_a_round"]))
            turns = (row["tokens"] - row["prefilled"]) / tokens_a_round(accepted.value, length)
            limit = row["tokens"] / (row["prefilled"] + turns * (1 + length * cost))
            figures[f"limit.{end}"] = Figure(limit, unit="x")
            figures[f"of_limit.{end}"] = Figure(speed.value / limit)
            figures[f"compute_bound.{end}"] = mean(row["compute_ratio"], "x")
        if "tokens_a_pass" in row:
            figures[f"fewer_passes.{end}"] = mean(row["tokens_a_pass"], "x")
        if "missing" in row:
            figures[f"missing.{end}"] = mean(row["missing"])
        if "different" in row:
            figures[f"different.{end}"] = Figure(float(np.mean(row["different"])))
    return figures
