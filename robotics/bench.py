"""`mmaccel bench robotics`: what a decorated policy still achieves, and how fast it answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mmaccel.bench import Bench, BenchResult, Progress, describe_machine, option, silent

SETTINGS = "vla-pruner.50,vla-pruner.25,vla-pruner.12.5,fastv.50,fastv.25,fastv.12.5,random.50,random.25,random.12.5"


@dataclass(frozen=True, kw_only=True)
class RoboticsBench(Bench):
    """Policies on the tabletop of `robotics.world`, dense and decorated, over the same held-out episodes.

    A setting is called "dense", METHOD.PERCENT, e.g. "vla-pruner.25", or METHOD.ACTIONS, e.g. "fixed-horizon.6"; see
    `robotics.bench_settings`.
    Figures of part=episodes, with 95 % intervals: `success.SETTING`, `steps`, `calls` (of the policy, in an episode),
    `share` (of the visual tokens that the language model's layers worked on, mean over layers and calls), and
    `success_over_dense.SETTING`, `success_over_random`, `success_over_fastv`: paired differences over the same
    episodes, the latter two at the same percentage.  For part=latency see `robotics.bench_latency`.
    """

    name: ClassVar[str] = "robotics"

    part: Literal["episodes", "latency"] = option("episodes", "what the policies achieve, or how long they take")
    settings: str = option(SETTINGS, "what is compared with dense, with commas between")
    model: str = option("pocket-vla", "a pocket model or a checkpoint folder of its kind")
    episodes: int = option(200, "episodes: how many")
    rows: int = option(32, "episodes: how many are played side by side")
    folder: str = option("", "episodes: keep every finished one here, and go on from what is there")
    shape: str = option(
        "A", "latency: random weights of a shape of the bench vision-tokens, A or A7; or pocket, the model"
    )
    rounds: int = option(100, "latency: interleaved calls of every setting, after one to warm up")
    device: str = option("cpu", "where the policies run, e.g. cuda")

    def __post_init__(self) -> None:
        if min(self.episodes, self.rows, self.rounds) < 1:
            raise ValueError(
                f"episodes, rows and rounds are at least 1; got {self.episodes}, {self.rows} and {self.rounds}"
            )

    def run(self, progress: Progress = silent) -> BenchResult:
        """Plays the episodes that are not there yet, or takes the times, and compares."""
        from robotics import bench_episodes, bench_latency
        from robotics.bench_settings import settings
        from robotics.pocket import load

        result, chosen = BenchResult(self.name, describe_machine(self.device)), settings(self.settings)
        if self.part == "latency":
            result.rows = bench_latency.measure(self.shape, chosen, self.rounds, self.device, progress)
            result.figures = bench_latency.compare(result.rows)
            return result
        folder = Path(self.folder) if self.folder else None
        policy = load(self.model, device=self.device)
        result.rows = bench_episodes.measure(policy, chosen, self.episodes, self.rows, folder, progress)
        result.figures = bench_episodes.compare(result.rows)
        return result

    def plot(self, result: BenchResult, path: str | Path) -> None:
        """Success over the share of visual tokens worked on, a curve a method with its intervals."""
        from mmaccel.plots import Point, pareto

        if self.part == "latency":
            raise ValueError("the plot shows success, and this run measured latency; set part=episodes")
        curves: dict[str, list[Point]] = {}
        for name, figure in result.figures.items():
            quantity, _, setting = name.partition(".")
            method, _, percent = setting.partition(".")
            share = 100 * result.figures[f"share.{setting}"].value
            if quantity == "success" and percent and share < 100:
                low, high = (figure.value if end is None else end for end in (figure.low, figure.high))
                curves.setdefault(method, []).append(Point(share, 100 * figure.value, 100 * low, 100 * high))
        pareto(
            curves,
            path,
            title=f"{self.model}: success on {self.episodes:,} held-out episodes",
            cost="visual tokens worked on (%), mean over layers and calls",
            quality="success (%), 95 % intervals",
            reference=100 * result.figures["success.dense"].value,
        )
