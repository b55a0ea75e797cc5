"""One episode of a robot policy, watched: what it sees, which patches it works on, and how fast it acts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from threading import Event

import torch
from PIL import Image

from mmaccel.methods import Method
from mmaccel.pocket.world import HELD_OUT_SEEDS
from robotics.action_tokens import ActionTokenPolicy
from robotics.rollout import Rollout, drawn, named, steps


@dataclass(frozen=True)
class Acted:
    """What is known so far."""

    picture: Image.Image
    figures: tuple[tuple[str, str], ...]


def act_live(
    policy: ActionTokenPolicy,
    methods: Sequence[Method],
    episode: int,
    stop: Event,
    show: Callable[[Acted], None],
) -> None:
    """Plays a held-out episode and shows every step; when `stop` is set, it ends after the step under way."""
    with closing(steps(policy, HELD_OUT_SEEDS[episode], methods)) as told:
        for rollout in told:
            over = len(rollout.pictures) > len(rollout.kept)
            ended = ("success" if rollout.success else "no success") if over else "stopped" if stop.is_set() else ""
            picture = drawn(rollout, named(methods), len(rollout.pictures) - 1)
            show(Acted(picture, (*figures(rollout), *([("ended", ended)] if ended else []))))
            if stop.is_set():
                return


def figures(rollout: Rollout) -> tuple[tuple[str, str], ...]:
    """Steps, calls of the policy, actions a second, and the share of patches that the last layer worked on."""
    kept = torch.stack(rollout.kept).float().mean()
    return (
        ("steps", str(len(rollout.kept))),
        ("calls of the policy", str(rollout.calls[-1])),
        ("actions a second", f"{len(rollout.seconds) / sum(rollout.seconds):.1f}"),
        ("patches that the last layer works on", f"{100 * kept:.0f} %"),
    )
