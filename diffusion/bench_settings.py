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
PLANS = {100: (2, 2, 1), 300: (2, 4, 2), 500: (3, 3, 3)}
"""Beams, candidates and lookahead of latent beam search that use up a budget in ten steps."""


def images(budgets: Sequence[int]) -> Settings:
    """Searches of pocket-flow by CLIP score; the judge is the parser."""
    reward = ClipScore()
    found: dict[str, Setting] = {}

    def rbf(nfe: int, **changes: Any) -> Setting:
        return Setting(RolloverBudgetForcing(reward, nfe, **changes), STEPS)

    def beams(nfe: int, lookahead: int) -> Setting:
        """As many candidates as the budget has room for."""
        evaluations, (count, _, _) = nfe // GUIDED, PLANS[nfe]
        candidates = (evaluations - count) // ((STEPS - 1) * count * lookahead)
        return Setting(LatentBeamSearch(reward, count, candidates, lookahead, eta=1.0), STEPS)

    found["plain.20"] = Setting(BestOfN(reward, 1), STEPS)
    for nfe in budgets:
        found[f"best-of-n.{nfe}"] = Setting(BestOfN(reward, nfe // (GUIDED * STEPS)), STEPS)
        found[f"rbf.{nfe}"] = rbf(nfe)
        found[f"dlbs.{nfe}"] = beams(nfe, 1)
        found[f"dlbs-lookahead.{nfe}"] = beams(nfe, PLANS[nfe][2])
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
    if method.endswith("best-of-n"):
        return []
    others = [f"{'video-' if method.startswith('video') else ''}best-of-n.{nfe}"]
    return [*others, f"{method.removesuffix('-lookahead')}.{nfe}"] if method.endswith("-lookahead") else others


def _seen(picture: torch.Tensor) -> world.Scene:
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return world.parse(pixels)


def _success(prompt: str, picture: torch.Tensor) -> float:
    return float(world.satisfies(prompt, _seen(picture)))


def _graded(prompt: str, picture: torch.Tensor) -> float:
    return world.score(prompt, _seen(picture))
