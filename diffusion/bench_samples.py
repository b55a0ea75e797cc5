"""Samples of a bench: made once, written down as they come, compared over the same prompts and seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mmaccel
from diffusion.finalists import SPENT
from diffusion.loading import load
from diffusion.rewards.base import as_reward
from diffusion.search import Search
from mmaccel.bench import Figure, Progress, mean, mean_difference, silent
from mmaccel.bench_rows import Row, kept_rows
from mmaccel.pocket import call_defaults
from mmaccel.registry import suggest


@dataclass(frozen=True)
class Setting:
    """A search with its budget, and the pipeline's number of steps."""

    search: Search
    steps: int


@dataclass(frozen=True)
class Settings:
    """What is compared: searches by name, on one model, by one reward and judges that are no rewards.

    judges: by name, `judge(prompt, picture) -> number`, picture a float tensor [(frames,) 3, height, width].
    baseline: of a setting's name, those that it is compared with.
    """

    model: str
    prompts: Callable[[int], list[str]]
    reward: Any
    judges: Mapping[str, Callable[[str, torch.Tensor], float]]
    settings: Mapping[str, Setting]
    baseline: Callable[[str], list[str]]

    def only(self, names: Sequence[str]) -> Settings:
        """Only the settings of these names, those of another part left out.  Raises ValueError for none at all."""
        kept = {name: setting for name, setting in self.settings.items() if name in names}
        if not kept:
            raise ValueError(f"there is no setting {names[0]!r}; {suggest(names[0], self.settings)}")
        return replace(self, settings=kept)


def measure(settings: Settings, pairs: int, folder: Path | None, progress: Progress = silent) -> list[Row]:
    """One row a setting and pair: what was delivered, what it cost, what the judges say.

    folder: gets a file a setting with a line a pair; pairs found there are not made again.
    """
    pipeline: Any = None
    prompts, rows = settings.prompts(pairs), []
    total = pairs * len(settings.settings)
    for place, (name, setting) in enumerate(settings.settings.items()):

        def make(
            wanted: Sequence[int], name: str = name, place: int = place, setting: Setting = setting
        ) -> Iterator[Row]:
            nonlocal pipeline
            pipeline = pipeline or quiet_pipeline(settings.model)
            for pair in wanted:
                progress(name, place * pairs + pair, total)
                yield {"setting": name, **sample(pipeline, settings, setting, prompts[pair], pair)}

        rows += kept_rows(name, pairs, folder, make)
    return rows


def sample(pipeline: Any, settings: Settings, setting: Setting, prompt: str, pair: int) -> Row:
    """Calls the pipeline once, decorated with the setting's search, and judges what it returns."""
    arguments = {**call_defaults(settings.model), "num_inference_steps": setting.steps, "output_type": "pt"}
    generator = torch.Generator().manual_seed(1_000_000 + pair)
    start = time.perf_counter()
    with mmaccel.applied(pipeline, setting.search) as run:
        found = torch.as_tensor(pipeline(prompt, generator=generator, **arguments)[0])
        seconds, report = time.perf_counter() - start, run.report
    return {
        "prompt": prompt,
        "reward": float(as_reward(settings.reward)(found, [prompt])),
        **{f"judge_{name}": judge(prompt, found[0]) for name, judge in settings.judges.items()},
        "denoiser_rows": report["denoiser_rows"],
        "seconds": seconds,
        "search_seconds": report.seconds.get("search", 0.0),
        "work_seconds": sum(report.seconds.get(name, 0.0) for name in SPENT),
    }


def compare(rows: Sequence[Row], baseline: Callable[[str], list[str]]) -> dict[str, Figure]:
    """Figures of every setting, and paired differences to its baselines."""
    by_setting: dict[str, list[Row]] = {}
    for row in rows:
        by_setting.setdefault(row["setting"], []).append(row)
    quantities = [name for name in rows[0] if name in ("reward",) or name.startswith("judge")]
    values = {
        (quantity, name): np.asarray([row[quantity] for row in mine])
        for name, mine in by_setting.items()
        for quantity in quantities
    }
    figures: dict[str, Figure] = {}
    rewards = np.concatenate([array for (quantity, _), array in values.items() if quantity == "reward"])
    figures["reward_range"] = Figure(float(rewards.max() - rewards.min()))
    for name, mine in by_setting.items():
        for quantity in quantities:
            figures[f"{quantity}.{name}"] = mean(values[quantity, name])
            for other in baseline(name):
                if other in by_setting:
                    kind = other.rpartition(".")[0].replace("-", "_")
                    figures[f"{quantity}_over_{kind}.{name}"] = mean_difference(
                        values[quantity, name], values[quantity, other]
                    )
        figures[f"denoiser_rows.{name}"] = Figure(max(row["denoiser_rows"] for row in mine), unit="rows")
        work = sum(row["work_seconds"] for row in mine)
        if work:
            figures[f"overhead.{name}"] = Figure(sum(row["search_seconds"] for row in mine) / work, unit="x")
        figures[f"seconds.{name}"] = Figure(float(np.median([row["seconds"] for row in mine])), unit="s")
    return figures


def quiet_pipeline(model: str) -> Any:
    """The pipeline of a model, without its progress bar."""
    pipeline, _ = load(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
