"""`mmaccel bench vision-tokens`: what the methods keep of a model's accuracy, and what they save."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmaccel.bench import Bench, BenchResult, Progress, as_list, describe_machine, option, silent
from mmaccel.registry import suggest

EVERY = (
    "hired,visionzip,prumerge,tome,fourier-vlm,random,uniform,pooled,aim,fastv,pyramid-drop,sparsevlm,shortv,prefix-kv"
)


@dataclass(frozen=True, kw_only=True)
class VisionTokensBench(Bench):
    """Quality on held-out questions of the pocket world, and speed against the oracle on random-weight shapes.

    A method is named by NAME, NAME:PRESET, NAME@BUDGET, or by several of these with + between, which then act together
    ("tome@0.5+hired+prefix-kv@0.5").

    Figures of quality: `accuracy.METHOD.PERCENT` with its interval, `accuracy_kept` (of dense), `over_random` and
    `over_hired` (paired over the same questions), `visual_tokens`.  Figures of speed: `ttft.SHAPE.RUN` (seconds to the
    first token), `tokens_per_second`, `answer` (seconds to the last token), `peak_memory` (live tensors beyond the
    weights, in the prefill), `kv_bytes`, where a run is "dense", a method or "METHOD oracle" (see
    `vision_tokens.oracle`; methods that act in the vision encoder have none, nor have those that rest in layers);
    `ttft_oracle_ratio.SHAPE.METHOD` (1 is the limit), `ttft_speedup` over dense and its limit `ttft_speedup_limit`,
    `ttft_over_hired`, times as fast as `hired` in the same run; the same for `decode` and `answer`.  Figures of
    selection: `selection.METHOD.TOKENS`, microseconds of reading, scoring, choosing and merging at so many visual
    tokens, gathering what stays not counted; `selection_growth.METHOD` from the fewest to the most tokens, over their
    ratio (1 is linear).
    """

    name: ClassVar[str] = "vision-tokens"

    part: Literal["all", "quality", "speed", "selection"] = option("all", "what to measure")
    methods: str = option(EVERY, "quality and selection: the methods, with commas between")
    budgets: str = option("1.0,0.5,0.2,0.1,0.05", "quality: the fractions of visual tokens kept")
    model: str = option("pocket-llava", "quality: a pocket model or a checkpoint folder")
    questions: int = option(1000, "quality: how many held-out questions")
    pixels: int = option(96, "quality: the size of the pictures that are drawn")
    batch: int = option(50, "quality: questions answered at a time")
    shapes: str = option("A,B", "speed: the shapes; A7 and B7, with 7 B parameters, are meant for a GPU")
    speed_methods: str = option("hired,fourier-vlm", "speed: the methods, with commas between")
    budget: float = option(0.2, "speed and selection: the fraction of visual tokens kept")
    tokens: int = option(64, "speed: new tokens of a run that measures decoding; at least 2")
    rounds: int = option(15, "speed and selection: rounds of interleaved runs to the first token, after one to warm up")
    decode_rounds: int = option(5, "speed: rounds of interleaved runs that decode, after one to warm up")
    rows: int = option(1, "speed: prompts of a run, all alike")
    device: str = option("cpu", "where the models run, e.g. cuda")

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise ValueError(f"decoding is what follows the first token, so tokens is at least 2; got {self.tokens}")
        if min(self.questions, self.batch, self.rows) < 1:
            raise ValueError(
                f"questions, batch and rows are at least 1; got {self.questions}, {self.batch} and {self.rows}"
            )

    def run(self, progress: Progress = silent) -> BenchResult:
        """Measures all parts, or the chosen one."""
        result = BenchResult(self.name, describe_machine(self.device))
        parts = {"quality": self._quality, "speed": self._speed, "selection": self._selection}
        for name, measure in parts.items():
            if self.part in (name, "all"):
                measure(result, progress)
        return result

    def plot(self, result: BenchResult, path: str | Path) -> None:
        """Accuracy against the budget, a curve a method with its intervals."""
        from mmaccel.plots import Point, pareto

        curves: dict[str, list[Point]] = {}
        for row in result.rows:
            if row["part"] == "quality" and row["method"] != "dense":
                values = (100 * row[key] for key in ("accuracy", "accuracy_low", "accuracy_high"))
                curves.setdefault(row["method"], []).append(Point(100 * row["budget"], *values))
        if not curves:
            raise ValueError("the plot shows accuracies, and this run measured none; set part=quality or part=all")
        pareto(
            curves,
            path,
            title=f"{self.model}: exact answers on {self.questions:,} held-out questions",
            cost="budget (%)",
            quality="exact answers (%), 95 % intervals",
            reference=100 * result.figures["accuracy.dense"].value,
        )

    def _quality(self, result: BenchResult, progress: Progress) -> None:
        from vision_tokens.bench_quality import Examination, measure_quality
        from vision_tokens.loading import load

        model, processor = load(self.model)
        examination = Examination.prepare(processor, self.questions, self.batch, self.pixels, self.device)
        budgets = [float(budget) for budget in as_list(self.budgets)]
        found = measure_quality(model.to(self.device), examination, as_list(self.methods), budgets, progress)
        _add(result, found)

    def _speed(self, result: BenchResult, progress: Progress) -> None:
        from vision_tokens.bench_settings import methods_named
        from vision_tokens.bench_shapes import SHAPES
        from vision_tokens.bench_speed import measure_speed

        settings = {name: methods_named(name, self.budget) for name in as_list(self.speed_methods)}
        chosen = as_list(self.shapes)
        for name in chosen:
            if name not in SHAPES:
                raise ValueError(f"there is no shape {name!r}; {suggest(name, SHAPES)}")
        measure = partial(
            measure_speed,
            tokens=self.tokens,
            batch=self.rows,
            rounds=self.rounds,
            decode_rounds=self.decode_rounds,
            device=self.device,
            progress=progress,
        )
        for name in chosen:
            _add(result, measure(name, SHAPES[name], settings))

    def _selection(self, result: BenchResult, progress: Progress) -> None:
        from vision_tokens.bench_selection import measure_selection

        _add(result, measure_selection(as_list(self.methods), self.budget, self.rounds, self.device, progress))


def _add(result: BenchResult, found: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    result.figures.update(found[0])
    result.rows.extend(found[1])
