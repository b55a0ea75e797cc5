"""What choosing costs by itself: reading attention, scoring, choosing and merging, without the model around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import mmaccel
from mmaccel.bench import Figure, Progress, interleave, median, silent
from mmaccel.methods import Unsupported
from vision_tokens.bench_settings import methods_named
from vision_tokens.bench_shapes import SHAPES, Shape
from vision_tokens.oracle import twin

LAYERS = 8  # of the language model: enough for every method's cuts
PARTS = ("selection", "ranking", "evict")
"""The seconds of a report that are spent on choosing: at the encoder, between layers, in the cache."""


def measure_selection(
    methods: Sequence[str], budget: float, rounds: int, device: str = "cpu", progress: Progress = silent
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """Figures and rows at the visual tokens of shapes A and B, whose language models are cut to `LAYERS` layers.

    methods: as `vision_tokens.bench_settings` reads them; those that cannot reach the budget get a row that says why,
    and no figures.
    """
    shapes = [replace(SHAPES[name], layers=LAYERS) for name in ("A", "B")]
    figures: dict[str, Figure] = {}
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        found, refused = of_shape(shape, methods, budget, rounds, device, progress)
        figures |= {f"selection.{name}.{shape.visual_tokens}": figure for name, figure in found.items()}
        rows += refused
    few, many = (shape.visual_tokens for shape in shapes)
    for name in methods:
        if f"selection.{name}.{few}" in figures:
            growth = figures[f"selection.{name}.{many}"].value / figures[f"selection.{name}.{few}"].value
            figures[f"selection_growth.{name}"] = Figure(growth / (many / few), unit="x")
    return figures, rows


def of_shape(
    shape: Shape, methods: Sequence[str], budget: float, rounds: int, device: str, progress: Progress
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """Microseconds by method, medians over interleaved runs, and what was refused."""
    model, inputs = shape.build(device), shape.inputs(device)
    runs, refused = {}, []
    for name in methods:
        try:
            decorated = mmaccel.apply(twin(model), *methods_named(name, budget))
        except Unsupported as reason:
            refused.append({"part": "refused", "method": name, "budget": budget, "reason": str(reason)})
        else:
            runs[name] = partial(spent, decorated, inputs)
    with torch.inference_mode():
        found = interleave(runs, rounds, progress=progress)
    return {name: median(1e6 * quantities["selection"], "us") for name, quantities in found.items()}, refused


def spent(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Seconds that a decorated model's method takes to choose in one prefill."""
    model(**inputs, use_cache=True)
    seconds = mmaccel.report(model).seconds
    return {"selection": sum(seconds.get(part, 0.0) for part in PARTS)}
