"""One search for a picture, watched: the candidates as they are scored, the reward so far, and what was found."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import diffusion
import mmaccel
from demos.drawing import drawn_curves
from diffusion.pictures import sheet
from diffusion.rewards import as_reward
from diffusion.search import Search
from mmaccel.reports import figure

SHOWN = 6  # candidates, finalists
PAUSE = 0.5  # seconds between two sights of a search, at least
SHARE = 4  # times as long as a sight takes is a search left alone
FIGURES = {"reward": "best reward", "denoiser_rows": "denoiser rows (NFE)", "decodes": "decodes",
           "reward_calls": "pictures scored"}  # fmt: skip


@dataclass(frozen=True)
class Searched:
    """What is known so far.  figures: name and value.  stopped: whether it ended early."""

    candidates: Image.Image | None = None
    curve: Image.Image | None = None
    best: Image.Image | None = None
    finalists: tuple[tuple[Image.Image, str], ...] = ()
    figures: tuple[tuple[str, str], ...] = ()
    stopped: bool = False


def search_live(
    pipeline: Any,
    search: Search,
    prompt: str,
    arguments: dict[str, Any],
    seed: int,
    stop: Event,
    show: Callable[[Searched], None],
) -> None:
    """Runs a search on a pipeline of its own; when `stop` is set, it ends with the best so far."""
    watched = Watched(as_reward(search.reward), pipeline, stop, show)
    mmaccel.apply(pipeline, dataclasses.replace(search, reward=watched, pictures=SHOWN))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    found = pipeline(prompt, generator=generator, **{**arguments, "output_type": "pt"})
    report = mmaccel.report(pipeline)
    data = report.to_dict()
    trace = [(float(rows), float(reward)) for rows, reward in data.get("reward_trace", [])]
    pictures = report.details.get("pictures")
    finalists = data.get("finalists", [])[:SHOWN]
    captions = [f"{number}: {one['reward']:.3f}, seed {one['seed']}" for number, one in enumerate(finalists, 1)]
    best = torch.as_tensor(found[0])[:1]
    shown = pictures[0] if pictures else best[: len(captions)]
    show(
        dataclasses.replace(
            watched.state,
            best=sheet(best, [captions[0] if captions else ""]),
            curve=drawn_curves({"best so far": trace}, prompt, "denoiser rows (NFE)", "reward") if trace else None,
            finalists=tuple((sheet(shown[at : at + 1], [""]), text) for at, text in enumerate(captions)),
            figures=tuple((words, figure(report[name])) for name, words in FIGURES.items() if name in data),
            stopped=bool(data.get("stopped")),
        )
    )


class Watched:
    """A reward that shows what it scores, and that lets a search be stopped."""

    def __init__(
        self, reward: Callable[..., Tensor], pipeline: Any, stop: Event, show: Callable[[Searched], None]
    ) -> None:
        self.reward, self.pipeline, self.stop, self.show = reward, pipeline, stop, show
        self.state = Searched()
        self.scores: list[float] = []
        self.due = 0.0

    def __call__(self, images: Tensor, prompts: Any, **context: Any) -> Tensor:
        scores = self.reward(images, prompts, **context)
        self.scores += torch.as_tensor(scores).tolist()
        if self.stop.is_set():
            diffusion.stop(self.pipeline)
        elif (began := time.monotonic()) > self.due:
            self._show(images, self.scores[-len(images) :])
            self.due = time.monotonic() + max(PAUSE, SHARE * (time.monotonic() - began))
        return scores

    def _show(self, images: Tensor, scores: list[float]) -> None:
        best = torch.tensor(self.scores).cummax(dim=0).values.tolist()
        lines = {"candidates": list(enumerate(self.scores, 1)), "best so far": list(enumerate(best, 1))}
        last = slice(-SHOWN, None)
        self.state = dataclasses.replace(
            self.state,
            candidates=sheet(images[last].cpu().float(), [f"{score:.3f}" for score in scores[last]]),
            curve=drawn_curves(lines, "so far", "pictures scored", "reward"),
            figures=(("best reward", f"{max(self.scores):.3g}"), ("pictures scored", str(len(self.scores)))),
        )
        self.show(self.state)
