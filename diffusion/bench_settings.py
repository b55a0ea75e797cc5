"""What `mmaccel bench diffusion` compares, at equal numbers of denoiser rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffusion.beam_search import LatentBeamSearch
from diffusion.bench_samples import Setting, Settings
from diffusion.best_of_n import BestOfN
from diffusion.rewards.clip import ClipScore
from diffusion.rollover import RolloverBudgetForcing
from mmaccel.pocket import world

STEPS = 10
GUIDED = 2  # denoiser rows an evaluation of pocket-flow and pocket-ddim: both run with guidance
ABLATIONS = 300  # NFE

PLANS = {
    ("dlbs", 100): (1, 5, 1, 10),
    ("dlbs", 300): (2, 8, 1, 10),
    ("dlbs", 500): (3, 9, 1, 10),
    ("dlbs-lookahead", 100): (2, 3, 2, 5),
    ("dlbs-lookahead", 300): (2, 4, 2, 10),
    ("dlbs-lookahead", 500): (3, 3, 3, 10),
}
"""Beams, candidates, lookahead and steps of latent beam search that use up a budget."""


def images(budgets: Sequence[int]) -> Settings:
    """Searches of pocket-flow by CLIP score; the judge is the parser."""
    reward = ClipScore()
    found: dict[str, Setting] = {}

    def rbf(nfe: int, **changes: Any) -> Setting:
        return Setting(RolloverBudgetForcing(reward, nfe, **changes), STEPS)

    def beams(kind: str, nfe: int) -> Setting:
        count, candidates, lookahead, steps = PLANS[kind, nfe]
        return Setting(LatentBeamSearch(reward, count, candidates, lookahead, eta=1.0), steps)

    found["plain.20"] = Setting(BestOfN(reward, 1), STEPS)
    for nfe in budgets:
        found[f"best-of-n.{nfe}"] = Setting(BestOfN(reward, nfe // (GUIDED * STEPS)), STEPS)
        found[f"rbf.{nfe}"] = rbf(nfe)
        found |= {f"{kind}.{nfe}": beams(kind, nfe) for kind in ("dlbs", "dlbs-lookahead")}
    if ABLATIONS in budgets:
        found[f"rbf-linear.{ABLATIONS}"] = rbf(ABLATIONS, path="linear")
    return Settings(
        model="pocket-flow",
        prompts=lambda count: world.prompts(count, seed=1),
        reward=reward,
        judges={"success": _success, "graded": _graded},
        settings=found,
        baseline=_baseline,
    )


def _baseline(name: str) -> list[str]:
    method, _, nfe = name.rpartition(".")
    if method in ("plain", "best-of-n"):
        return []
    return [f"best-of-n.{nfe}", *([f"dlbs.{nfe}"] if method == "dlbs-lookahead" else [])]


def _seen(picture: torch.Tensor) -> world.Scene:
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return world.parse(pixels)


def _success(prompt: str, picture: torch.Tensor) -> float:
    return float(world.satisfies(prompt, _seen(picture)))


def _graded(prompt: str, picture: torch.Tensor) -> float:
    return world.score(prompt, _seen(picture))
