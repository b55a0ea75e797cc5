"""Pictures and videos of the pocket world, and rewards, for tests of rewards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmaccel.pocket import world


def pictures(rows: int = 4, pixels: int | tuple[int, int] = 32, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Scenes of one to three things, [rows, 3, height, width], and their captions."""
    rng = np.random.default_rng(seed)
    scenes = [world.sample_scene(rng, (1, 3), world.DRAWN) for _ in range(rows)]
    return as_tensor([world.render(scene, pixels) for scene in scenes]), [world.captions(scene)[0] for scene in scenes]


def moving(rows: int = 3, frames: int = 6, pixels: int = 32, speed: float = 0.03) -> tuple[Tensor, list[str]]:
    """A thing that moves to the right over a ground of its own, [rows, frames, 3, pixels, pixels], and what it is.

    speed: widths a frame, times the number of the row plus one.
    """
    videos = [
        as_tensor([
            world.render(world.Scene((world.Thing("square", "red", 0.25 + time * speed * row, 0.5, 0.3),), row), pixels)
            for time in range(frames)
        ])
        for row in range(1, rows + 1)
    ]  # fmt: skip
    return torch.stack(videos), ["a red square"] * rows


def as_tensor(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 pictures [height, width, 3] as floats [pictures, 3, height, width] in 0..1."""
    return torch.from_numpy(np.stack(images)).movedim(-1, -3).float() / 255


def mean_red(images: Tensor, prompts: Sequence[str | None], **context: object) -> Tensor:
    """A user's own reward."""
    return images[..., 0, :, :].flatten(1).mean(dim=1)
