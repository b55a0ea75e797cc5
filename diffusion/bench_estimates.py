"""The estimates part of `mmaccel bench diffusion`: how much a search can trust what it judges noisy latents by.

Along plain noisy runs of a model, several successors of a latent are judged by estimates of different depth, and
each is then taken to its end by the pipeline's own deterministic steps: what the estimate was to foretell.  That says
by how much choosing by an estimate raises the sample's reward, step by step, and what it costs; and how often the first
successor's estimate beats its parent's, which is what accepting the first improvement asks for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

import mmaccel
from diffusion.bench_samples import quiet_pipeline
from diffusion.lookahead import look_ahead
from diffusion.particles import Particles
from diffusion.problem import Problem, Rewards
from diffusion.rewards.clip import ClipScore
from diffusion.search import Rounds, Search
from diffusion.steps import ddim, ode
from mmaccel.bench import Figure, Progress, mean, silent
from mmaccel.bench_rows import Row, kept_rows
from mmaccel.pocket import call_defaults, world

STEPS = 10


@dataclass(frozen=True)
class Study(Search):
    """Walks down one noisy run and notes, at every step, what its siblings promise and what becomes of them.

    siblings: successors of each latent, of which the first goes on.  depths: evaluations of the estimates compared.
    notes: one entry a step: the parent's estimate, and by depth and for the ends the rewards of the siblings.
    """

    name: ClassVar[str] = "study"

    siblings: int = 8
    depths: tuple[int, ...] = (1, 2, 4)
    notes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def chooses(self) -> bool:
        return True

    def search(self, problem: Problem) -> Rounds:
        parent = problem.scored(problem.start(1))
        for number in range(problem.steps - 1):
            step = ddim(problem.grid.at(number), problem.grid.at(number + 1), eta=1.0)
            children = problem.denoise(problem.propose(parent, step, at=number, candidates=self.siblings))
            assert parent.reward is not None
            note = {"parent": parent.reward.item(), "ends": self.ends(problem, children).tolist()}
            for depth in self.depths:
                _, estimates = look_ahead(problem, children, depth)
                note[f"depth {depth}"] = problem.score(estimates.latents, estimates.trails).tolist()
            self.notes.append(note)
            parent = problem.scored(children.gather([0]))
            yield (number + 1) / problem.steps
        end = problem.finished(parent)
        end = problem.scored(end, end.latents)
        yield 1.0
        return end

    def ends(self, problem: Problem, particles: Particles) -> Rewards:
        """The rewards of the samples that the pipeline's own levels lead to, without noise."""
        below = (problem.grid.sigma > 0) & (problem.grid.sigma < float(particles.level.sigma[0]) * (1 - 1e-6))
        for number in below.nonzero().flatten().tolist():
            particles = problem.propose(particles, ode(problem.grid.at(number)), at=0)
        clean = problem.finished(particles)
        return problem.score(clean.latents, clean.trails)


def measure(model: str, pairs: int, folder: Path | None, progress: Progress = silent) -> list[Row]:
    """A row a pair and step; pairs found in `folder` are not made again."""
    reward, prompts = ClipScore(), world.prompts(pairs, seed=1)

    def study(wanted: Sequence[int]) -> Iterator[Row]:
        pipeline = quiet_pipeline(model)
        arguments = {**call_defaults(model), "num_inference_steps": STEPS, "output_type": "pt"}
        for pair in wanted:
            progress("estimates", pair, pairs)
            walk = Study(reward)
            with mmaccel.applied(pipeline, walk):
                pipeline(prompts[pair], generator=torch.Generator().manual_seed(1_000_000 + pair), **arguments)
            yield {"prompt": prompts[pair], "notes": walk.notes}

    return kept_rows("estimates", pairs, folder, study)


def compare(rows: Sequence[Row]) -> dict[str, Figure]:
    """Figures by depth and step, means over the pairs with 95 % intervals.

    gain.depth-D.step-S: by how much the end of the sibling that the estimate prefers exceeds the siblings' mean.
    equal_cost.depth-D.step-S: the same, choosing among as many siblings as cost what depth 1 costs among all.
    first_is_better.step-S: how often the first sibling's posterior mean scores above its parent's.
    sharpening.step-S, spread.step-S: the mean change of posterior means' rewards from parent to child, and the standard
    deviation among siblings.
    """
    figures: dict[str, Figure] = {}
    for step in range(len(rows[0]["notes"])):
        notes = [row["notes"][step] for row in rows]
        ends = np.array([note["ends"] for note in notes])
        near = np.array([note["depth 1"] for note in notes])
        parents = np.array([note["parent"] for note in notes])
        figures[f"first_is_better.step-{step}"] = mean((near[:, 0] > parents).astype(float))
        figures[f"sharpening.step-{step}"] = mean(near.mean(axis=1) - parents)
        figures[f"spread.step-{step}"] = mean(near.std(axis=1))
        for name in (key for key in notes[0] if key.startswith("depth")):
            depth, estimates = int(name.split()[1]), np.array([note[name] for note in notes])
            for title, among in (("gain", ends.shape[1]), ("equal_cost", max(1, ends.shape[1] // depth))):
                gains = [gain(one[:among], end[:among]) for one, end in zip(estimates, ends, strict=True)]
                figures[f"{title}.depth-{depth}.step-{step}"] = mean(np.array(gains))
    return figures


def gain(estimates: np.ndarray, ends: np.ndarray) -> float:
    """The end of what the estimates prefer, over the mean of all ends."""
    return float(ends[estimates.argmax()] - ends.mean())
