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
    `ttft_over_hired`, times as fast as `hired` in the same run; the same for `decode` and `answer`.  Of methods that
    rank by all rows of a layer, `ttft_ranked_ratio`: as the oracle ratio, with one `softmax(q k^T)` of each layer that
    they rank taken from their time.
    Figures of selection: `selection.METHOD.TOKENS`, microseconds of reading, scoring, choosing and merging at so many
    visual tokens, gathering what stays not counted; `selection_growth.METHOD` from the fewest to the most tokens, over
    their ratio (1 is linear).  Figures of pareto: those of quality, and `ttft.SHAPE.METHOD@BUDGET` on the first shape.
    """

    name: ClassVar[str] = "vision-tokens"

    part: Literal["all", "quality", "speed", "selection", "pareto"] = option(
        "all", "what to measure; pareto is quality over the time to the first token"
    )
    methods: str = option(EVERY, "quality, selection and pareto: the methods, with commas between")
    budgets: str = option("1.0,0.5,0.2,0.1,0.05", "quality and pareto: the fractions of visual tokens kept")
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
        parts = {"pareto": self._pareto} if self.part == "pareto" else parts
        for name, measure in parts.items():
            if self.part in (name, "all"):
                measure(result, progress)
        return result

    def plot(self, result: BenchResult, path: str | Path) -> None:
        """Accuracy against the budget, or the measured time of part=pareto, a curve a method with its intervals."""
        from mmaccel.plots import Point, pareto

        curves: dict[str, list[Point]] = {}
        cost, seconds = "budget (%)", {}
        if self.part == "pareto":
            shape = as_list(self.shapes)[0]
            cost = f"seconds to the first token, shape {shape}"
            seconds = {row["run"]: row["ttft_seconds"] for row in result.rows if row["part"] == "first token"}
        for row in result.rows:
            if row["part"] == "quality" and row["method"] != "dense":
                at = seconds.get(_with_budget(row["method"], row["budget"])) if seconds else 100 * row["budget"]
                values = (100 * row[key] for key in ("accuracy", "accuracy_low", "accuracy_high"))
                if at is not None:
                    curves.setdefault(row["method"], []).append(Point(at, *values))
        if not curves:
            raise ValueError("the plot shows accuracies, and this run measured none; set part=quality or part=all")
        pareto(
            curves,
            path,
            title=f"{self.model}: exact answers on {self.questions:,} held-out questions",
            cost=cost,
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
        measure = partial(
            measure_speed,
            tokens=self.tokens,
            batch=self.rows,
            rounds=self.rounds,
            decode_rounds=self.decode_rounds,
            device=self.device,
            progress=progress,
        )
        for name in self._shapes():
            _add(result, measure(name, SHAPES[name], settings))

    def _pareto(self, result: BenchResult, progress: Progress) -> None:
        """Quality, and beside it the time of every method at every budget that it reached."""
        from vision_tokens.bench_settings import methods_named
        from vision_tokens.bench_shapes import SHAPES
        from vision_tokens.bench_speed import measure_first_tokens

        name = self._shapes()[0]
        self._quality(result, progress)
        reached = [_with_budget(row["method"], row["budget"]) for row in result.rows[1:] if row["part"] == "quality"]
        settings = {setting: methods_named(setting, self.budget) for setting in reached}
        _add(result, measure_first_tokens(name, SHAPES[name], settings, self.rounds, self.device, progress))

    def _shapes(self) -> list[str]:
        from vision_tokens.bench_shapes import SHAPES

        for name in (chosen := as_list(self.shapes)):
            if name not in SHAPES:
                raise ValueError(f"there is no shape {name!r}; {suggest(name, SHAPES)}")
        return chosen

    def _selection(self, result: BenchResult, progress: Progress) -> None:
        from vision_tokens.bench_selection import measure_selection

        _add(result, measure_selection(as_list(self.methods), self.budget, self.rounds, self.device, progress))


def _with_budget(name: str, budget: float) -> str:
    """The name of these methods, each at its own budget or at this one."""
    return "+".join(part if "@" in part else f"{part}@{budget:g}" for part in name.split("+"))


def _add(result: BenchResult, found: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    result.figures.update(found[0])
    result.rows.extend(found[1])
