"""Draws the pictures of this folder, with their questions; the same every time."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
from PIL import Image

from mmaccel.pocket import world
from mmaccel.pocket.pictures import FOLDER

FIRST_SEED = 9_000_000  # of the held-out ones; the measured accuracies use others
ROOM = 192  # pixels of the longer side that LLaVA-NeXT's tiles make of a picture

# name: (model, height, width, fewest and most things)
PLAN = {
    "three-things.png": ("pocket-llava", 96, 96, (3, 3)),
    "four-things.png": ("pocket-llava", 96, 96, (4, 4)),
    "five-things.png": ("pocket-llava", 96, 96, (5, 5)),
    "large.png": ("pocket-llava-next", 192, 192, (6, 6)),
    "wide.png": ("pocket-llava-next", 108, 192, (4, 4)),
}


def sizes_for(height: int, width: int) -> tuple[float, float]:
    """Smallest and largest thing, of the shorter side: 11 to 17 pixels of what the model sees."""
    if (height, width) == (96, 96):
        return world.SIZES
    scale = max(height, width) / ROOM / min(height, width)
    return 11 * scale, 17 * scale


def one_of_each_kind(scene: world.Scene, rng: np.random.Generator) -> list[world.Question] | None:
    """A question of every kind that is not about something absent, or None if the scene has none of some kind."""
    first: dict[str, world.Question] = {}
    for question in world.questions(scene, rng):
        if question.answer != world.NUMBERS[0]:
            first.setdefault(question.kind, question)
    return [first[kind] for kind in world.KINDS] if len(first) == len(world.KINDS) else None


def scenes(
    height: int, width: int, things: tuple[int, int], seed: int
) -> Iterator[tuple[world.Scene, list[world.Question]]]:
    """Held-out scenes that questions of every kind can be asked about."""
    rng = np.random.default_rng(world.HELD_OUT_SEEDS[seed])
    while True:
        scene = world.sample_scene(rng, things, sizes_for(height, width), width / height)
        if asked := one_of_each_kind(scene, rng):
            yield scene, asked


def main() -> None:
    """Writes the PNG files and `pictures.json`."""
    listed = {}
    for number, (name, (model, height, width, things)) in enumerate(PLAN.items()):
        scene, asked = next(scenes(height, width, things, FIRST_SEED + number))
        Image.fromarray(world.render(scene, (height, width))).save(FOLDER / name, optimize=True)
        turned = asked[number % len(asked) :] + asked[: number % len(asked)]  # so that first questions differ in kind
        listed[name] = {"model": model, "questions": [[question.text, question.answer] for question in turned]}
    (FOLDER / "pictures.json").write_text(json.dumps(listed, indent=2) + "\n")


if __name__ == "__main__":
    main()
