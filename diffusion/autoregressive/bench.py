"""`mmaccel bench ar`: what speculation saves of an autoregressive image model's time, and that it changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmaccel.bench import Bench, BenchResult, Progress, as_list, describe_machine, option, silent

DEFAULTS = {
    "continuous": ("pocket-mar", "exact.2,exact.4,exact.8,exact.adaptive"),
    "discrete": ("pocket-imagegpt", "independent.16,coupled.16,coupled.32,gumbel.16,gumbel.32,zipar.8"),
    "published": ("pocket-mar", "published.8,published.16"),
    "lossless": ("pocket-mar", "exact.4"),
}
"""The model and the settings of each part."""


@dataclass(frozen=True, kw_only=True)
class AutoregressiveBench(Bench):
    """Speculation against plain generation of the same model, taking turns.

    A setting is MODE.LENGTH of `continuous-speculation`, e.g. "exact.4" or "exact.adaptive", REDRAW.WINDOW of
    `speculative-jacobi`, e.g. "coupled.16", or, not lossless, zipar.WINDOW or zipar-adaptive.WINDOW.  For the figures
    see `diffusion.autoregressive.bench_speed.compare` and `bench_lossless.compare`.  part=published draws with a masked
    model, whose backbone reruns at every step: with the model if it is one, else with random weights of its sizes, as
    the time asks for no more.
    """

    name: ClassVar[str] = "ar"

    part: Literal["continuous", "discrete", "published", "lossless"] = option(
        "continuous", "time of continuous or discrete tokens, of the paper's published mode, or a test of distributions"
    )
    model: str = option("", "a pocket model or a checkpoint folder; pocket-mar or pocket-imagegpt if empty")
    settings: str = option("", "what is compared with plain generation, with commas between")
    batches: str = option("1,16", "how many pictures at a time, with commas between; distributions take the last")
    rounds: int = option(10, "interleaved turns of every setting, after one to warm up")
    images: int = option(2000, "lossless, published: pictures of each setting, and twice as many of plain generation")
    guidance: float = option(1.0, "1 is without")
    diffusion_steps: int | None = option(None, "of a diffusion head, a token; the model's own if left away")
    prefill: float = option(0.05, "share of a picture of continuous tokens that the target draws alone, first")
    folder: str = option("", "lossless, published: keep every picture here, and go on from what is there")

    def __post_init__(self) -> None:
        if min(self.rounds, self.images, *self.numbers) < 1:
            raise ValueError(
                f"rounds, images and batches are at least 1; got {self.rounds}, {self.images} and {self.batches}"
            )

    @property
    def numbers(self) -> list[int]:
        """The sizes of batches.  Raises ValueError for what is no list of numbers."""
        try:
            return [int(batch) for batch in as_list(self.batches)] or [1]
        except ValueError:
            raise ValueError(f"batches are whole numbers with commas between; got {self.batches!r}") from None

    def run(self, progress: Progress = silent) -> BenchResult:
        """Takes the times, or draws the pictures that are not there yet, and compares."""
        from diffusion.autoregressive import bench_lossless, bench_speed
        from diffusion.autoregressive.bench_settings import masked, methods
        from diffusion.autoregressive.painters import load_painter

        model, names = DEFAULTS[self.part]
        painter = load_painter(self.model or model)
        if self.part == "published":
            painter = masked(painter)
        chosen = methods(painter, as_list(self.settings or names), self.prefill)
        call: dict[str, Any] = {"guidance": self.guidance}
        if self.diffusion_steps is not None:
            call["diffusion_steps"] = self.diffusion_steps
        result = BenchResult(self.name, describe_machine())
        if self.part != "lossless":
            result.rows = bench_speed.measure(painter, chosen, self.numbers, self.rounds, call, progress)
            result.figures = bench_speed.compare(result.rows)
        if self.part in ("lossless", "published"):
            folder = Path(self.folder) if self.folder else None
            rows = bench_lossless.measure(painter, chosen, self.images, self.numbers[-1], call, folder, progress)
            result.rows += rows
            result.figures |= bench_lossless.compare(rows)
        return result

    def plot(self, result: BenchResult, path: str | Path) -> None:
        """Speed-up over the length of drafts, or of the window, a curve a mode and batch with its intervals."""
        from mmaccel.plots import Point, pareto

        curves: dict[str, list[Point]] = {}
        for name, figure in result.figures.items():
            quantity, _, rest = name.partition(".")
            mode, _, length = rest.partition(".")
            length, _, batch = length.partition(".")
            if quantity == "speed_up" and length.isdigit():
                low, high = (figure.value if end is None else end for end in (figure.low, figure.high))
                point = Point(float(length), figure.value, low, high)
                curves.setdefault(f"{mode}, {batch.replace('_', ' ')}", []).append(point)
        if not curves:
            raise ValueError("the plot shows times, and this run tested distributions; set part=continuous or discrete")
        pareto(
            curves,
            path,
            title="Speculation against plain generation",
            cost="tokens drafted a round, or in a window",
            quality="times as fast, 95 % intervals",
            reference=1.0,
        )
