"""Moving scenes of the procedural world: clips, their captions, an exact parser of clips, and the judge of prompts.

A thing stands still or moves evenly in one of four directions. As in `world`, lengths are fractions of the image's
shorter side, positions are fractions of its width and height, and the judge is a parser, no learned reward.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mmaccel.pocket import world
from mmaccel.pocket.world import Scene, Thing

Clip = NDArray[np.uint8]  # [frames, height, width, 3]

DIRECTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FRAMES = 8
TRAVEL = (0.3, 0.42)  # of the side, from the first frame to the last: 10 to 13 pixels of 32
_STILL = 0.12  # a thing that travels less has not moved


@dataclass(frozen=True)
class Motion:
    """Where a thing goes: a direction, and how far from the first frame to the last (of the side)."""

    direction: str
    travel: float = 0.0


@dataclass(frozen=True)
class MovingScene:
    """A scene as the first frame shows it, and how each of its things moves."""

    first: Scene
    motions: tuple[Motion, ...]

    def at(self, time: float) -> Scene:
        """The scene at a time in [0, 1], from the first frame to the last."""
        return replace(
            self.first,
            things=tuple(
                _shifted(thing, motion, time) for thing, motion in zip(self.first.things, self.motions, strict=True)
            ),
        )


def _shifted(thing: Thing, motion: Motion, time: float) -> Thing:
    dx, dy = DIRECTIONS[motion.direction]
    return replace(thing, x=thing.x + dx * motion.travel * time, y=thing.y + dy * motion.travel * time)


def sample_moving(
    rng: np.random.Generator, things: tuple[int, int] = (1, 2), sizes: tuple[float, float] = world.DRAWN
) -> MovingScene:
    """A random square moving scene: things of different names that stay inside and apart for the whole clip."""
    while True:
        first = world.sample_scene(rng, things, sizes)
        names = [thing.name for thing in first.things]
        motions = []
        for _ in names:
            direction = list(DIRECTIONS)[rng.integers(len(DIRECTIONS))]
            motions.append(Motion(direction, float(rng.uniform(*TRAVEL)) if direction != "still" else 0.0))
        scene = MovingScene(first, tuple(motions))
        if len(set(names)) == len(names) and all(_fits(scene.at(time)) for time in np.linspace(0, 1, FRAMES)):
            return scene


def _fits(scene: Scene) -> bool:
    inside = all(
        0.62 * thing.size <= place <= 1 - 0.62 * thing.size for thing in scene.things for place in (thing.x, thing.y)
    )
    return inside and all(
        np.hypot(one.x - other.x, one.y - other.y) >= 0.625 * (one.size + other.size) + world.GAP
        for number, one in enumerate(scene.things)
        for other in scene.things[:number]
    )


def render_moving(scene: MovingScene, frames: int = FRAMES, pixels: int = 32, texture: bool = False) -> Clip:
    """The clip of a moving scene, uint8 [frames, height, width, 3].  Arguments as of `world.render`."""
    times = np.linspace(0, 1, frames) if frames > 1 else [0.0]
    return np.stack([world.render(scene.at(float(time)), pixels, texture) for time in times])


def caption(scene: MovingScene) -> str:
    """All things with their motions: "a red circle moving right, a blue square standing still"."""
    said = [
        f"a {thing.name} {_said(motion.direction)}"
        for thing, motion in zip(scene.first.things, scene.motions, strict=True)
    ]
    return ", ".join(said) or "nothing"


def _said(direction: str) -> str:
    return "standing still" if direction == "still" else f"moving {direction}"


def parse_moving(clip: Clip) -> MovingScene:
    """The things of a clip and how they move, if each frame shows the same names; else the first frame's, all still.

    Things of one name are told apart by where they were in the frame before.  Directions and distances come from a
    straight line through the places of all frames.  Exact for rendered clips.
    """
    scenes = [world.parse(frame) for frame in clip]
    if len({tuple(sorted(thing.name for thing in scene.things)) for scene in scenes}) > 1:
        return MovingScene(scenes[0], (Motion("still"),) * len(scenes[0].things))
    motions = []
    for thing in scenes[0].things:
        path, here = [], thing
        for scene in scenes:
            alike = [other for other in scene.things if other.name == thing.name]
            here = min(alike, key=lambda other: np.hypot(other.x - here.x, other.y - here.y))
            path.append((here.x, here.y))
        motions.append(_motion(np.array(path)))
    return MovingScene(scenes[0], tuple(motions))


def _motion(path: NDArray[np.float64]) -> Motion:
    """The motion that fits places best, [frames, 2]."""
    if len(path) < 2:
        return Motion("still")
    slope = np.polyfit(np.linspace(0, 1, len(path)), path, 1)[0]
    axis = int(np.abs(slope).argmax())
    if abs(slope[axis]) < _STILL:
        return Motion("still")
    towards = (("left", "right"), ("up", "down"))[axis][int(slope[axis] > 0)]
    return Motion(towards, float(abs(slope[axis])))


def read_prompt(prompt: str) -> list[tuple[str, str]]:
    """The (name, direction) pairs that a caption as `caption` makes it names; "and" may join its parts.

    Raises ValueError for other texts.
    """
    text = " ".join(prompt.lower().strip().rstrip(".").split())
    pairs = []
    for part in re.split(r", and |, | and ", text) if text != "nothing" else []:
        match = re.fullmatch(r"(.+?) (?:moving (left|right|up|down)|(?:standing )?(still))", part)
        if not match:
            raise ValueError(
                f"the judge cannot read {part!r} in the prompt {prompt!r}. It reads clips such as "
                '"a red circle moving right, a blue square standing still".'
            )
        name, direction, still = match.groups()
        pairs += [(one, direction or still) for one in world.read_prompt(name).names]
    return pairs


def score_motion(prompt: str, clip: Clip) -> float:
    """How far a clip is what a prompt says, in [0, 1]; 1 if each frame shows these things alone, and they move so.

    Half for the names, the mean over frames of `world.score`; half for the share of names that move as said.
    Raises ValueError for a prompt that `read_prompt` cannot read.
    """
    pairs = read_prompt(prompt)
    inventory = ", ".join(f"a {name}" for name, _ in pairs) or "nothing"
    names = float(np.mean([world.score(inventory, world.parse(frame)) for frame in clip]))
    return (names + moved_as_said(prompt, clip)) / 2


def moved_as_said(prompt: str, clip: Clip) -> float:
    """The share of the names in a prompt that move as it says, in [0, 1]; 1 for a prompt that names nothing.

    Raises ValueError for a prompt that `read_prompt` cannot read.
    """
    pairs, scene = read_prompt(prompt), parse_moving(clip)
    seen = Counter(
        (thing.name, motion.direction) for thing, motion in zip(scene.first.things, scene.motions, strict=True)
    )
    return (seen & Counter(pairs)).total() / len(pairs) if pairs else 1.0


def satisfies_motion(prompt: str, clip: Clip) -> bool:
    """Whether each frame of a clip shows exactly the things of a prompt, and they move as it says.

    Raises ValueError for a prompt that `read_prompt` cannot read.
    """
    return score_motion(prompt, clip) == 1


def prompts(count: int, seed: int = 0) -> list[str]:
    """Evaluation prompts of one and of two things in turn, the same every time.

    seed: which of the held-out sequences; below 10,000,000.
    """
    rng = np.random.default_rng(world.HELD_OUT_SEEDS[seed])
    return [caption(sample_moving(rng, (1 + number % 2,) * 2)) for number in range(count)]
