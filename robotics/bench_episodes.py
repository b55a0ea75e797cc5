"""Episodes of a bench: played once, written down as they end, compared over the same seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import mmaccel
from mmaccel.attachment import attached
from mmaccel.bench import Figure, Progress, mean, mean_difference, silent
from mmaccel.bench_rows import Row, kept_rows
from mmaccel.pocket.world import HELD_OUT_SEEDS
from robotics.action_tokens import ActionTokenPolicy
from robotics.bench_settings import Setting
from robotics.control import Controller
from robotics.pocket import look
from robotics.world import PushWorld

UNITS = {"success": "", "steps": "steps", "calls": "calls", "share": "of the visual tokens, mean over layers and calls"}
RIVALS = ("random", "fastv")  # what a method has to beat at the same percentage


def worked_on(policy: ActionTokenPolicy, rows: int) -> list[float]:
    """The share of the visual tokens that the language model's layers worked on in the last call, by row."""
    if not attached(policy.model):
        return [1.0] * rows
    report = mmaccel.report(policy.model)
    held, whole = report.quantities["visual_tokens"].read()
    assert whole is not None
    if not (report.facts.get("steps") and report.facts.get("cuts")):
        return [held / whole] * rows
    layers, cut = len(policy.host.decoder_layers), report.facts["cuts"][0]["layer"]
    kept = [sum(step["kept"]) * rows / whole for step in report.facts["steps"]]
    return [(cut + (layers - cut) * share) / layers for share in kept]


@dataclass
class Episode:
    """What is noted while it runs."""

    steps: int = 0
    success: bool = False
    over: bool = False
    shares: list[float] = field(default_factory=list)  # of every call

    def row(self) -> Row:
        return {
            "success": self.success,
            "steps": self.steps,
            "calls": len(self.shares),
            "share": float(np.mean(self.shares)),
        }


def play(policy: ActionTokenPolicy, seeds: Sequence[int]) -> list[Row]:
    """One episode a seed, side by side: whether it succeeded, its steps, its calls, and what was worked on."""
    worlds, episodes, control = [PushWorld() for _ in seeds], [Episode() for _ in seeds], Controller(policy)
    for world, seed in zip(worlds, seeds, strict=True):
        world.reset(seed=seed)
    control.reset()
    while alive := [row for row, episode in enumerate(episodes) if not episode.over]:
        before = dict(control.asked)
        actions = control.step(look(worlds, alive))
        asked = [row for row in alive if control.asked[row] > before.get(row, 0)]
        for row, share in zip(asked, worked_on(policy, len(asked)) if asked else (), strict=True):
            episodes[row].shares.append(share)
        for row, action in zip(alive, actions.double().numpy(), strict=True):
            _, _, success, late, _ = worlds[row].step(action)
            episode = episodes[row]
            episode.steps, episode.success, episode.over = episode.steps + 1, success, success or late
    return [episode.row() for episode in episodes]


def measure(
    policy: ActionTokenPolicy,
    chosen: Sequence[Setting],
    episodes: int,
    rows: int,
    folder: Path | None,
    progress: Progress = silent,
) -> list[Row]:
    """A row a setting and held-out episode; `rows` of them are played side by side.

    folder: gets a file a setting with a line an episode; episodes found there are not played again.
    """
    found = []
    for place, setting in enumerate(chosen):

        def make(wanted: Sequence[int], setting: Setting = setting, place: int = place) -> Iterator[Row]:
            with setting.applied(policy):
                for start in range(0, len(wanted), rows):
                    progress(setting.name, place * episodes + wanted[start], len(chosen) * episodes)
                    yield from play(policy, [HELD_OUT_SEEDS[number] for number in wanted[start : start + rows]])

        kept = kept_rows(setting.name, episodes, folder, make, key="episode")
        found += [{"setting": setting.name, **row} for row in kept]
    return found


def compare(rows: Sequence[Row]) -> dict[str, Figure]:
    """Figures of every setting, and differences in success over the same episodes: to dense, and to its rivals."""
    by_setting: dict[str, list[Row]] = {}
    for row in rows:
        by_setting.setdefault(row["setting"], []).append(row)
    values = {
        name: {quantity: np.asarray([float(row[quantity]) for row in mine]) for quantity in UNITS}
        for name, mine in by_setting.items()
    }
    figures = {}
    for name, found in values.items():
        for quantity, unit in UNITS.items():
            figures[f"{quantity}.{name}"] = mean(found[quantity], unit)
        method, _, percent = name.partition(".")
        for rival in ("dense", *(f"{other}.{percent}" for other in RIVALS if other != method)):
            if rival in values and rival != name:
                short = rival.partition(".")[0]
                figures[f"success_over_{short}.{name}"] = mean_difference(found["success"], values[rival]["success"])
    return figures
