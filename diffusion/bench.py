"""`mmaccel bench diffusion`: what a search makes of its evaluations, at equal numbers of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mmaccel.bench import Bench, BenchResult, Progress, as_list, describe_machine, option, silent


@dataclass(frozen=True, kw_only=True)
class DiffusionBench(Bench):
    """Searches of a pocket pipeline against each other at equal NFE, over the same prompts and seeds.

    A setting is called METHOD.NFE, e.g. "rbf.500"; see `diffusion.bench_settings`.  Figures: `reward.SETTING` and
    `judge.SETTING` (the share of samples that show exactly what the prompt says, by the exact parser, which no reward
    is), with 95 % intervals; `reward_over_best_of_n`, `judge_over_best_of_n` and, for lookahead, `..._over_dlbs`:
    paired differences over the same prompts and seeds; `reward_range` (the distance from the lowest to the highest
    reward of any sample); `denoiser_rows.SETTING` (the most that any search spent); `overhead.SETTING` (seconds of the
    search over the sum of its evaluations, decodes and rewards).  For part=estimates see
    `diffusion.bench_estimates.compare`.
    """

    name: ClassVar[str] = "diffusion"

    part: Literal["images", "videos", "estimates"] = option(
        "images", "pictures, clips of pocket-video, or what estimates are worth on the way to pictures"
    )
    model: Literal["pocket-flow", "pocket-turbo"] = option(
        "pocket-flow", "what draws the pictures: a model of many steps, or one of few"
    )
    settings: str = option("", "only these settings, with commas between; all if empty")
    nfe: str = option("100,300,500", "the budgets, denoiser rows; ablations run at 300")
    pairs: int = option(400, "how many (prompt, seed) pairs")
    folder: str = option("", "keep every finished sample here, and go on from what is there; several runs may share it")

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"a bench needs at least one pair; got {self.pairs}")

    def run(self, progress: Progress = silent) -> BenchResult:
        """Makes the samples that are not there yet, and compares."""
        from diffusion import bench_estimates, bench_samples
        from diffusion.bench_settings import images
        from diffusion.bench_videos import videos

        result, folder = BenchResult(self.name, describe_machine()), Path(self.folder) if self.folder else None
        if self.part == "estimates":
            result.rows = bench_estimates.measure(self.model, self.pairs, folder, progress)
            result.figures = bench_estimates.compare(result.rows)
            return result
        budgets = [int(budget) for budget in as_list(self.nfe)]
        settings = images(budgets, self.model) if self.part == "images" else videos(budgets)
        if wanted := as_list(self.settings):
            settings = settings.only(wanted)
        result.rows = bench_samples.measure(settings, self.pairs, folder, progress)
        result.figures = bench_samples.compare(result.rows, settings.baseline)
        return result

    def plot(self, result: BenchResult, path: str | Path) -> None:
        """Reward over NFE, a curve a method with its intervals; gain over the steps, a curve a depth, of estimates."""
        from mmaccel.plots import Point, pareto
        from mmaccel.plots import curves as draw

        if self.part == "estimates":
            lines: dict[str, list[tuple[float, float]]] = {}
            for name, figure in result.figures.items():
                quantity, _, rest = name.partition(".")
                if quantity == "equal_cost":
                    depth, _, step = rest.partition(".step-")
                    lines.setdefault(depth, []).append((float(step), figure.value))
            draw(
                lines,
                path,
                title="What choosing by an estimate gains, at equal cost",
                x="step",
                y="reward of the end, over the mean of all",
            )
            return

        curves: dict[str, list[Point]] = {}
        for name, figure in result.figures.items():
            quantity, _, setting = name.partition(".")
            method, _, nfe = setting.rpartition(".")
            if quantity == "reward" and nfe.isdigit():
                curves.setdefault(method, []).append(
                    Point(float(nfe), figure.value, figure.low or figure.value, figure.high or figure.value)
                )
        pareto(
            {name: points for name, points in curves.items() if len(points) > 1} or curves,
            path,
            title=f"Reward of what is delivered, {self.part}",
            cost="denoiser rows (NFE)",
            quality="reward, 95 % intervals",
        )
