"""An episode as a video: what the camera sees, and beside it which patches the policy worked on.

Kept patches are bright, dropped ones dim, as `vision_tokens.overlay` draws them; what is shown is what the language
model's last layer worked on when the policy was last asked.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image as Pictures
from torch import Tensor

import mmaccel
from mmaccel.attachment import attached
from mmaccel.films import write_film
from mmaccel.methods import Method
from mmaccel.pocket.world import Image
from robotics.action_tokens import ActionTokenPolicy
from robotics.control import Controller
from robotics.pocket import look
from robotics.policies import Inputs
from robotics.world import PushWorld
from vision_tokens.decoder_laws import layers_of_last_call
from vision_tokens.overlay import SIDE, Panel, draw_cells, sheet

RATE = 10  # frames a second, one a step
HOLD = 10  # frames for which the end is shown


@dataclass
class Rollout:
    """An episode: its pictures, one more than it has steps, and for each the patches that its action came from."""

    instruction: str
    success: bool = False
    pictures: list[Image] = field(default_factory=list)
    kept: list[Bool[Tensor, "height width"]] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)  # of the policy, up to each picture
    seconds: list[float] = field(default_factory=list)  # that each step waited for its action


def kept_patches(policy: ActionTokenPolicy, inputs: Inputs) -> Bool[Tensor, "height width"]:
    """Which patches of the only camera the last layer worked on in the policy's last call, of one row."""
    visual = policy.places(inputs).camera[0] >= 0
    side = round(int(visual.sum()) ** 0.5)
    keep = torch.ones(side * side, dtype=torch.bool)
    if attached(policy.model):
        if cells := mmaccel.report(policy.model).details.get("cells"):
            keep = cells[0][0].cpu()
        if layers := layers_of_last_call(policy.model, len(visual)):
            keep = keep & layers[max(layers)][0][visual].cpu()
    return keep.view(side, side)


def steps(policy: ActionTokenPolicy, seed: int, methods: Sequence[Method] = ()) -> Generator[Rollout, None, None]:
    """One episode of the tabletop, told after every step, the policy's model decorated as long as it lasts."""
    world, over = PushWorld(), False
    world.reset(seed=seed)
    control, rollout = Controller(policy), Rollout(world.instruction)
    with mmaccel.applied(policy.model, *methods) if methods else nullcontext():
        control.reset()
        while not over:
            observation, calls, began = look([world], [0]), control.calls, time.perf_counter()
            action = control.step(observation)[0].double().numpy()
            rollout.seconds.append(time.perf_counter() - began)
            asked = control.calls > calls
            kept = kept_patches(policy, policy.observe(observation)) if asked else rollout.kept[-1]
            rollout.pictures.append(world.render())
            rollout.kept.append(kept)
            rollout.calls.append(control.calls)
            _, _, rollout.success, late, _ = world.step(action)
            over = rollout.success or late
            if over:
                rollout.pictures.append(world.render())
            yield rollout


def play(policy: ActionTokenPolicy, seed: int, methods: Sequence[Method] = ()) -> Rollout:
    """One whole episode; arguments as of `steps`."""
    *_, rollout = steps(policy, seed, methods)
    return rollout


def drawn(rollout: Rollout, name: str, step: int) -> Pictures.Image:
    """What is seen at a step and which patches the policy worked on.  name: of what decorates the policy."""
    last = step == len(rollout.kept)
    kept, calls = rollout.kept[min(step, len(rollout.kept) - 1)], rollout.calls[min(step, len(rollout.calls) - 1)]
    whole = Pictures.fromarray(rollout.pictures[step])
    said = ("done" if rollout.success else "not done") if last else f"step {step + 1}"
    seen = Panel(whole.resize((SIDE, SIDE), Pictures.Resampling.BICUBIC), said)
    share = f"{int(kept.sum())} of {kept.numel()} patches"
    return sheet(rollout.instruction, [seen, Panel(draw_cells(whole, kept), f"{name}: {share}, call {calls}")])


def frames(rollout: Rollout, name: str) -> Iterator[Image]:
    """The video's pictures, as `drawn` makes them; the last one stays for a second."""
    for step in range(len(rollout.pictures)):
        page = drawn(rollout, name, step)
        for _ in range(HOLD if step == len(rollout.kept) else 1):
            yield np.asarray(page)[: page.height // 2 * 2, : page.width // 2 * 2]


def named(methods: Sequence[Method]) -> str:
    """What the pictures call these decorations."""
    return " + ".join(method.name for method in methods) or "dense"


def record(policy: ActionTokenPolicy, path: str | Path, seed: int, methods: Sequence[Method] = ()) -> Rollout:
    """Plays one episode and writes it as a video, ten steps a second."""
    rollout = play(policy, seed, methods)
    write_film(path, frames(rollout, named(methods)), RATE, sharpness=18)
    return rollout
