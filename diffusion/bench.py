"""`mmaccel bench diffusion`: what a search makes of its evaluations, at equal numbers of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmaccel.bench import Bench, BenchResult, Progress, as_list, describe_machine, option, silent


@dataclass(frozen=True, kw_only=True)
class DiffusionBench(Bench):
    """Searches of a pocket pipeline against each other at equal NFE, over the same prompts and seeds.

    A setting is called METHOD.NFE, e.g. "rbf.500"; see `diffusion.bench_settings`.  Figures: `reward.SETTING` and
    `judge.SETTING` (the share of samples that show exactly what the prompt says, by the exact parser, which no reward
    is), with 95 % intervals; `reward_over_best_of_n`, `judge_over_best_of_n` and, for lookahead, `..._over_dlbs`:
    paired differences over the same prompts and seeds; `reward_range` (the distance from the lowest to the highest
    reward of any sample); `denoiser_rows.SETTING` (the most that any search spent); `overhead.SETTING` (seconds of the search
    over the sum of its evaluations, decodes and rewards).
    """

    name: ClassVar[str] = "diffusion"

    part: Literal["all", "images", "video"] = option("all", "what to measure")
    settings: str = option("", "only these settings, with commas between; all if empty")
    nfe: str = option("100,300,500", "images: the budgets, denoiser rows; ablations run at 300")
    pairs: int = option(400, "images: how many (prompt, seed) pairs")
    video_pairs: int = option(200, "video: how many (prompt, seed) pairs")
    folder: str = option("", "keep every finished sample here, and go on from what is there; several runs may share it")

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.video_pairs < 1:
            raise ValueError(f"a bench needs at least one pair; got {self.pairs} and {self.video_pairs}")

    def run(self, progress: Progress = silent) -> BenchResult:
        """Measures both parts, or the chosen one."""
        from diffusion.bench_samples import compare, measure
        from diffusion.bench_settings import images, video

        result = BenchResult(self.name, describe_machine())
        budgets = [int(budget) for budget in as_list(self.nfe)]
        parts: dict[str, Any] = {"images": (images(budgets), self.pairs), "video": (video(), self.video_pairs)}
        for part, (settings, pairs) in parts.items():
            if self.part not in (part, "all"):
                continue
            if wanted := as_list(self.settings):
                settings = settings.only(wanted)
            rows = measure(settings, pairs, Path(self.folder) if self.folder else None, progress)
            result.rows += rows
            result.figures |= compare(rows, settings.baseline)
        return result

    def plot(self, result: BenchResult, path: str | Path) -> None:
        """Reward over NFE, a curve a method with its intervals."""
        from mmaccel.plots import Point, pareto

        curves: dict[str, list[Point]] = {}
        for name, figure in result.figures.items():
            quantity, _, setting = name.partition(".")
            method, _, nfe = setting.rpartition(".")
            if quantity == "reward" and nfe.isdigit() and not method.startswith("video"):
                curves.setdefault(method, []).append(
                    Point(float(nfe), figure.value, figure.low or figure.value, figure.high or figure.value)
                )
        pareto(
            {name: points for name, points in curves.items() if len(points) > 1} or curves,
            path,
            title="pocket-flow: reward of the delivered picture",
            cost="denoiser rows (NFE)",
            quality="CLIP score, 95 % intervals",
        )
