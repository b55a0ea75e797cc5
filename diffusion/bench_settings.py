"""What `mmaccel bench diffusion` compares, at equal numbers of denoiser rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from diffusion.beam_search import LatentBeamSearch
from diffusion.bench_samples import Setting, Settings
from diffusion.best_of_n import BestOfN
from diffusion.blockwise import CoDe
from diffusion.noise_search import ZeroOrderSearch
from diffusion.particle_filter import ParticleFilter
from diffusion.rewards.base import Reward
from diffusion.rewards.clip import ClipScore
from diffusion.rollover import RolloverBudgetForcing
from diffusion.search import Search
from diffusion.search_over_paths import SearchOverPaths
from diffusion.svdd import SVDD
from mmaccel.pocket import world

STEPS = 10
ABLATIONS = 300  # NFE
MODELS = {"pocket-flow": 2, "pocket-turbo": 1}
"""Denoiser rows of an evaluation: pocket-flow runs with guidance, pocket-turbo has it distilled."""

SEARCHED = 0.45
"""Beam search chooses down to this share of the steps: later, candidates differ in little that counts."""


def images(budgets: Sequence[int], model: str) -> Settings:
    """Searches of pocket-flow or pocket-turbo by CLIP score; the judge is the parser."""
    reward = ClipScore()
    found: dict[str, Setting] = {}

    def add(name: str, nfe: int, search: Search) -> None:
        found[f"{name}.{nfe}"] = Setting(search, STEPS)

    add("plain", MODELS[model] * STEPS, BestOfN(reward, 1))
    for nfe in budgets:
        evaluations = nfe // MODELS[model]
        add("best-of-n", nfe, BestOfN(reward, evaluations // STEPS))
        add("rbf", nfe, RolloverBudgetForcing(reward, nfe))
        add("rbf-paper", nfe, RolloverBudgetForcing.preset("paper", reward=reward, nfe=nfe))
        add("dlbs", nfe, beam_search(reward, evaluations, lookahead=1))
        add("dlbs-lookahead", nfe, beam_search(reward, evaluations, lookahead=2))
        add("particle-filter", nfe, ParticleFilter(reward, particles=evaluations // STEPS))
        add("svdd", nfe, SVDD(reward, chains=1, candidates=(evaluations - 1) // (STEPS - 1)))
        add("code", nfe, CoDe(reward, chains=1, candidates=(evaluations - 1) // (STEPS - 1)))
        add("search-over-paths", nfe, search_over_paths(reward, evaluations))
        add("zero-order-search", nfe, ZeroOrderSearch(reward, nfe=nfe))
        if nfe == ABLATIONS:
            add("rbf-linear", nfe, RolloverBudgetForcing(reward, nfe, path="linear"))
            add("dlbs-lookahead-3", nfe, beam_search(reward, evaluations, lookahead=3))
    return Settings(
        model=model,
        prompts=lambda count: world.prompts(count, seed=1),
        reward=reward,
        judges={"success": _success, "graded": _graded},
        settings=found,
        baseline=_baseline,
    )


def beam_search(reward: Reward, evaluations: int, lookahead: int) -> LatentBeamSearch:
    """As many candidates as the evaluations pay for, of one beam, two (from 100 evaluations on) or four (from 400)."""
    beams = 1 if evaluations < 100 else 2 if evaluations < 400 else 4
    searched = sum((STEPS - 1 - number) / STEPS >= SEARCHED for number in range(STEPS - 1))
    candidates = (evaluations - beams * (STEPS - searched)) // (searched * beams * lookahead)
    return LatentBeamSearch(reward, beams, candidates, lookahead, eta=1.0, search_range=(1.0, SEARCHED))


def search_over_paths(reward: Reward, evaluations: int) -> SearchOverPaths:
    """One chain, and as many copies a round as the evaluations pay for."""
    search = SearchOverPaths(reward, chains=1)
    copies = (evaluations // search.ode_steps - 1) // search.rounds
    return replace(search, candidates=max(1, copies))


def _baseline(name: str) -> list[str]:
    method, _, nfe = name.rpartition(".")
    if method in ("plain", "best-of-n"):
        return []
    return [f"best-of-n.{nfe}", *([f"dlbs.{nfe}"] if method.startswith("dlbs-lookahead") else [])]


def _seen(picture: torch.Tensor) -> world.Scene:
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return world.parse(pixels)


def _success(prompt: str, picture: torch.Tensor) -> float:
    return float(world.satisfies(prompt, _seen(picture)))


def _graded(prompt: str, picture: torch.Tensor) -> float:
    return world.score(prompt, _seen(picture))
