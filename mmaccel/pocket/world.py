"""A procedural world of coloured shapes: scenes, captions, questions with answers, and an exact parser.

Lengths are fractions of the image's shorter side and positions are fractions of its width and height, so one scene can
be drawn at any resolution. The parser reads a scene back from pixels; it judges what a model drew or said, and no
learned reward stands between.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Field = NDArray[np.floating[Any]]

SHAPES = ("circle", "square", "triangle", "cross")
PALETTE = {
    "red": (225, 50, 50),
    "green": (55, 195, 75),
    "blue": (65, 95, 235),
    "yellow": (235, 210, 50),
    "purple": (165, 60, 205),
    "white": (240, 240, 240),
}
COLOURS = tuple(PALETTE)
KINDS = ("colour", "shape", "count", "place")
NUMBERS = ("zero", "one", "two", "three", "four")
REGIONS = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")
PROMPTS = ("one", "count", "pair", "trio", "relation")  # what `sample_prompt` draws

SIZES = (0.115, 0.177)  # 11 to 17 pixels of 96
LARGE = (0.24, 0.36)  # 8 to 12 pixels of 32
DRAWN = (0.2, 0.36)  # 6 to 12 pixels of 32, for models that draw small pictures
GAP = 0.06  # free space between two things
BORDER = 0.035  # no thing's centre is nearer to the border of a region, of width or height
HELD_OUT_SEEDS = range(10_000_000, 20_000_000)  # for evaluation; `train_rng` refuses them

_AREA = {"circle": np.pi, "square": 4 * 0.88**2, "triangle": 0.75 * 3**0.5 * 1.15**2, "cross": 8 * 0.36 - 4 * 0.36**2}


@dataclass(frozen=True)
class Thing:
    """A coloured shape: its centre (x of the width, y of the height) and its size (of the shorter side)."""

    shape: str
    colour: str
    x: float
    y: float
    size: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def region(self) -> str:
        """The ninth of the image that holds the centre, "top left" to "bottom right"."""
        return REGIONS[3 * min(int(3 * self.y), 2) + min(int(3 * self.x), 2)]


@dataclass(frozen=True)
class Scene:
    """Things before a background. background: the seed of its texture; aspect: width / height."""

    things: tuple[Thing, ...]
    background: int = 0
    aspect: float = 1.0


@dataclass(frozen=True)
class Question:
    """A question about a scene, and its one exact answer."""

    kind: str
    text: str
    answer: str


def train_rng(seed: int, step: int = 0) -> np.random.Generator:
    """The generator for step `step` of training with this seed.

    Raises ValueError for a seed reserved for evaluation.
    """
    if seed in HELD_OUT_SEEDS:
        raise ValueError(
            f"seeds {HELD_OUT_SEEDS.start} to {HELD_OUT_SEEDS.stop - 1} are held out for evaluation; got {seed}. "
            "Train with a seed outside that range."
        )
    return np.random.default_rng((seed, step))


def sample_scene(
    rng: np.random.Generator,
    things: tuple[int, int] = (1, 5),
    sizes: tuple[float, float] = SIZES,
    aspect: float = 1.0,
) -> Scene:
    """A random scene without overlaps, no centre near the border of a region.

    things: fewest and most things, both included.  sizes: smallest and largest, of the shorter side.
    Half of the scenes repeat shapes or colours on purpose, so that counts above one are common.
    Raises ValueError if the things do not fit.
    """
    count, repeat = int(rng.integers(things[0], things[1] + 1)), rng.random()
    for _ in range(200):
        placed = _place(rng, count, repeat, sizes, max(aspect, 1.0), max(1 / aspect, 1.0))
        if len(placed) == count:
            return Scene(tuple(placed), int(rng.integers(2**31)), aspect)
    raise ValueError(f"{count} things of size {sizes} with gaps of {GAP} do not fit; ask for fewer or smaller things.")


def _place(
    rng: np.random.Generator, count: int, repeat: float, sizes: tuple[float, float], width: float, height: float
) -> list[Thing]:
    """Things put down one after another where there is room, fewer than `count` where there is none.

    repeat: below 0.3 later things take the first one's shape half of the time, from 0.2 to 0.5 its colour.
    width and height: of the picture, in shorter sides.
    """
    placed: list[Thing] = []
    for _ in range(40 * count):
        if len(placed) == count:
            break
        size = float(rng.uniform(*sizes))
        x = float(rng.uniform(0.62 * size / width, 1 - 0.62 * size / width))
        y = float(rng.uniform(0.62 * size / height, 1 - 0.62 * size / height))
        if min(abs(place - border) for place in (x, y) for border in (1 / 3, 2 / 3)) < BORDER:
            continue
        apart = [np.hypot((x - thing.x) * width, (y - thing.y) * height) for thing in placed]
        if any(d < 0.625 * (size + thing.size) + GAP for d, thing in zip(apart, placed, strict=True)):
            continue
        shape, colour = SHAPES[rng.integers(len(SHAPES))], COLOURS[rng.integers(len(COLOURS))]
        if placed and rng.random() < 0.5:
            shape = placed[0].shape if repeat < 0.3 else shape
            colour = placed[0].colour if 0.2 < repeat < 0.5 else colour
        placed.append(Thing(shape, colour, x, y, size))
    return placed


def _distance(shape: str, u: Field, v: Field, radius: float) -> Field:
    """Signed distance to the outline, negative inside: u rightward and v downward from the centre."""
    if shape == "circle":
        return np.hypot(u, v) - radius
    u, absolute_v = np.abs(u), np.abs(v)
    if shape == "square":
        return np.maximum(u, absolute_v) - 0.88 * radius
    if shape == "triangle":  # equilateral, pointing up, its centroid at the centre
        return np.asarray(np.maximum(v, 3**0.5 / 2 * u - 0.5 * v) - 0.575 * radius)
    arm = 0.36 * radius
    return np.asarray(np.minimum(np.maximum(u - radius, absolute_v - arm), np.maximum(u - arm, absolute_v - radius)))


def _cover(shape: str, x: float, y: float, radius: float, height: int, width: int) -> tuple[slice, slice, Field]:
    """The rows and columns that a shape touches, and its anti-aliased coverage there, in [0, 1].  All in pixels."""
    reach = 1.25 * radius + 1
    rows = slice(max(int(y - reach), 0), min(int(y + reach) + 2, height))
    columns = slice(max(int(x - reach), 0), min(int(x + reach) + 2, width))
    u = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + np.float32(0.5 - x)
    v = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + np.float32(0.5 - y)
    return rows, columns, np.clip(0.5 - _distance(shape, u, v, radius), 0, 1)


def _interpolation(points: int, pixels: int) -> Field:
    """Linear interpolation from `points` values to `pixels` values, as a matrix [pixels, points]."""
    position = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels * (points - 1)
    return np.asarray(np.clip(1 - np.abs(position[:, None] - np.arange(points, dtype=np.float32)), 0, 1))


def _background(seed: int, height: int, width: int, texture: bool) -> Field:
    """Dark grey [height, width, 3]; textured by clouds, grain, and muted scratches and specks, which are no things."""
    rng = np.random.default_rng(seed)
    tint = rng.uniform(28, 55) + rng.uniform(-4, 4, 3)
    if not texture:
        return np.broadcast_to(tint.astype(np.float32), (height, width, 3)).copy()
    clouds = rng.uniform(-9, 9, (6, 6)).astype(np.float32)
    grey = _interpolation(6, height) @ clouds @ _interpolation(6, width).T
    short = min(height, width)
    for _ in range(rng.integers(1, 4)):  # scratches
        x, y, angle, length, depth = rng.uniform((0, 0, 0, 0.08, -16), (width / short, height / short, np.pi, 0.3, 22))
        dx, dy, thickness = np.cos(angle) * length / 2, np.sin(angle) * length / 2, max(0.006 * short, 0.6)
        rows = slice(max(int((y - abs(dy)) * short) - 2, 0), int((y + abs(dy)) * short) + 3)
        columns = slice(max(int((x - abs(dx)) * short) - 2, 0), int((x + abs(dx)) * short) + 3)
        v = np.arange(rows.start, min(rows.stop, height), dtype=np.float32)[:, None] + np.float32(0.5 - y * short)
        u = np.arange(columns.start, min(columns.stop, width), dtype=np.float32)[None] + np.float32(0.5 - x * short)
        along = u * np.float32(np.cos(angle)) + v * np.float32(np.sin(angle))
        across = np.abs(v * np.float32(np.cos(angle)) - u * np.float32(np.sin(angle)))
        inside = np.clip(thickness + 0.5 - across, 0, 1) * (np.abs(along) < length * short / 2)
        grey[rows, columns] += np.float32(depth) * inside
    canvas = grey[:, :, None] + tint.astype(np.float32)
    for _ in range(rng.integers(2, 7)):  # specks
        x, y, radius = rng.uniform((0, 0, 0.008), (width / short, height / short, 0.022))
        shade = (rng.uniform(-14, 22) + rng.uniform(-7, 7, 3)).astype(np.float32)
        rows, columns, cover = _cover("circle", x * short, y * short, radius * short, height, width)
        canvas[rows, columns] += cover[:, :, None] * shade
    grain = rng.standard_normal((height, width), dtype=np.float32)
    canvas += 2.5 * grain[:, :, None]
    return canvas


def shape_of(pixels: int | tuple[int, int], aspect: float = 1.0) -> tuple[int, int]:
    """(height, width) in pixels; a whole number means the shorter side of a picture of this aspect."""
    if not isinstance(pixels, int):
        return pixels
    return round(pixels * max(1 / aspect, 1.0)), round(pixels * max(aspect, 1.0))


def sizes_at(height: int, width: int) -> tuple[float, float]:
    """Sizes of things that are 11 to 17 pixels in a picture of this size; `LARGE` ones where that would crowd it."""
    short = min(height, width)
    return (SIZES[0] * 96 / short, SIZES[1] * 96 / short) if short >= 96 else LARGE


def draw(scene: Scene, pixels: int | tuple[int, int] = 96, texture: bool = True) -> tuple[Image, Image]:
    """The picture, uint8 [height, width, 3], and which thing each pixel shows, uint8 [height, width].

    0 is background; n is `scene.things[n - 1]`, wherever it covers at least half of the pixel.
    """
    height, width = shape_of(pixels, scene.aspect)
    canvas = _background(scene.background, height, width, texture)
    shown = np.zeros((height, width), np.uint8)
    for number, thing in enumerate(scene.things, 1):
        rows, columns, cover = paint(canvas, thing)
        shown[rows, columns][cover >= 0.5] = number
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), shown


def paint(canvas: Field, thing: Thing) -> tuple[slice, slice, Field]:
    """Draws a thing onto a canvas [height, width, 3] of floats in 0..255, in place.

    Returns the rows and columns that it touches, and how much of each pixel there it covers.
    """
    height, width = canvas.shape[:2]
    radius = thing.size * min(height, width) / 2
    rows, columns, cover = _cover(thing.shape, thing.x * width, thing.y * height, radius, height, width)
    under = canvas[rows, columns]
    under += cover[:, :, None] * (np.asarray(PALETTE[thing.colour], np.float32) - under)
    return rows, columns, cover


def render(scene: Scene, pixels: int | tuple[int, int] = 96, texture: bool = True) -> Image:
    """The picture of a scene, uint8 [height, width, 3].

    pixels: (height, width), or the shorter side.  texture: clouds, scratches, specks and grain on the background.
    """
    return draw(scene, pixels, texture)[0]


def parse(image: Image) -> Scene:
    """The things in a picture, in reading order of their centres; `background` is 0.

    image: uint8 [height, width, 3].  Exact for rendered scenes: shapes, colours and number are right and positions and
    sizes agree to a fraction of a pixel.  A blob is a thing when its brightest channel stands out of the background;
    its colour is the palette colour that explains its pixels best as a blend with the background, its shape the one
    whose drawing, of the blob's own area and centre of mass, differs least.
    Raises ValueError for another shape or dtype.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a uint8 picture [height, width, 3]; got {image.dtype} {list(image.shape)}.")
    from scipy import ndimage

    height, width = image.shape[:2]
    short = min(height, width)
    bright = image.max(axis=2) > 122
    labels, count = ndimage.label(bright, structure=np.ones((3, 3)))  # 8-connected
    behind = image[~bright]
    ground = (np.median(behind, axis=0) if len(behind) else np.zeros(3)).astype(np.float32)
    pad = 1 if short < 64 else 2
    things = []
    for number in range(1, count + 1):
        row, column = np.nonzero(labels == number)
        if len(row) < 3:
            continue
        rows = slice(max(row.min() - pad, 0), row.max() + pad + 1)
        columns = slice(max(column.min() - pad, 0), column.max() + pad + 1)
        mine = (labels[rows, columns] == number) | (labels[rows, columns] == 0)
        offset = (image[rows, columns] - ground) * mine[:, :, None]
        colour, cover = _best_colour(offset, ground, labels[rows, columns] == number)
        area = float(cover.sum())
        y = float((cover.sum(1) * (np.arange(rows.start, rows.start + cover.shape[0]) + 0.5)).sum() / area)
        x = float((cover.sum(0) * (np.arange(columns.start, columns.start + cover.shape[1]) + 0.5)).sum() / area)
        errors = {shape: _mismatch(shape, cover, x - columns.start, y - rows.start, area) for shape in SHAPES}
        shape = min(errors, key=errors.__getitem__)
        things.append(Thing(shape, colour, x / width, y / height, 2 * (area / _AREA[shape]) ** 0.5 / short))
    return Scene(tuple(sorted(things, key=lambda thing: (thing.y, thing.x))), 0, width / height)


def _best_colour(offset: Field, ground: Field, core: NDArray[np.bool_]) -> tuple[str, Field]:
    """The palette colour that best explains a blob, and how much of each pixel it covers, in [0, 1]."""

    def blend(colour: str) -> tuple[float, Field]:
        toward = np.asarray(PALETTE[colour], np.float32) - ground
        cover = np.clip(offset @ toward / (toward @ toward), 0, 1)
        return float(((offset - cover[:, :, None] * toward)[core] ** 2).sum()), cover

    blends = {colour: blend(colour) for colour in COLOURS}
    best = min(blends, key=lambda colour: blends[colour][0])
    cover = blends[best][1]
    return best, np.where(cover > 0.12, cover, 0)


def _mismatch(shape: str, cover: Field, x: float, y: float, area: float) -> float:
    """Squared difference between a blob and the shape of the same area and centre of mass."""
    drawn = np.zeros_like(cover)
    rows, columns, drawing = _cover(shape, x, y, float((area / _AREA[shape]) ** 0.5), *cover.shape)
    drawn[rows, columns] = drawing
    return float(((drawn - cover) ** 2).sum())


def _counted(number: int, name: str) -> str:
    plural = name + ("es" if name.endswith("cross") else "s")
    return f"a {name}" if number == 1 else f"{NUMBERS[number] if number < len(NUMBERS) else number} {plural}"


def relation(first: Thing, second: Thing, aspect: float = 1.0) -> str | None:
    """How the first thing lies to the second: "left of", "right of", "above", "below", or None when it is diagonal."""
    dx, dy = (first.x - second.x) * max(aspect, 1.0), (first.y - second.y) * max(1 / aspect, 1.0)
    if abs(dx) > 1.5 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.5 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def captions(scene: Scene) -> list[str]:
    """True captions: first the full inventory ("a red circle, two blue squares"), then relations of unique things."""
    names = [thing.name for thing in scene.things]
    inventory = ", ".join(_counted(names.count(name), name) for name in dict.fromkeys(names))
    unique = [thing for thing in scene.things if names.count(thing.name) == 1]
    relations = [
        f"a {first.name} {how} a {second.name}"
        for first in unique
        for second in unique
        if first is not second and (how := relation(first, second, scene.aspect))
    ]
    return [inventory or "nothing", *relations]


def sample_prompt(rng: np.random.Generator, kind: str) -> tuple[str, Scene]:
    """A prompt, and a scene that satisfies it, with things of the sizes `DRAWN`.

    kind: "one" thing; "count", two to four of a name; "pair", two different things; "trio", three things that are not
    all the same; "relation", how one of two different things lies to the other.
    """
    number = {"one": 1, "count": int(rng.integers(2, 5)), "pair": 2, "trio": 3, "relation": 2}[kind]
    classes = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    chosen = [classes[i] for i in rng.permutation(len(classes))[:number]]
    if kind == "count":
        chosen = chosen[:1] * number
    elif kind == "trio" and rng.random() < 0.5:
        chosen[1] = chosen[0]
    while True:
        placed = sample_scene(rng, (number, number), DRAWN)
        pairs = zip(placed.things, chosen, strict=True)
        things = tuple(replace(thing, shape=shape, colour=colour) for thing, (shape, colour) in pairs)
        inventory, *relations = captions(replace(placed, things=things))
        if kind != "relation":
            return inventory, replace(placed, things=things)
        if relations:
            return relations[rng.integers(len(relations))], replace(placed, things=things)


def prompts(count: int, seed: int = 0) -> list[str]:
    """Evaluation prompts: all kinds of `PROMPTS` but "one" in turn, the same every time.

    seed: which of the held-out sequences; below 10,000,000.
    """
    rng = np.random.default_rng(HELD_OUT_SEEDS[seed])
    return [sample_prompt(rng, PROMPTS[1:][number % 4])[0] for number in range(count)]


@dataclass(frozen=True)
class Claim:
    """What a prompt says: the names of all things, and perhaps how the first of two lies to the second."""

    names: tuple[str, ...]
    relation: str | None = None


_NAME = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?:es|s)?"
_COUNTED = re.compile(rf"(?:(an?|{'|'.join(NUMBERS)}|five|six|seven|eight|nine|\d) )?{_NAME}")
_RELATED = re.compile(rf"(?:an? |one |the )?{_NAME} ({'|'.join(RELATIONS)}) (?:an? |one |the )?{_NAME}")
_AMOUNT = {word: number for number, word in enumerate((*NUMBERS, "five", "six", "seven", "eight", "nine"))}


def read_prompt(prompt: str) -> Claim:
    """What a caption as `captions` makes it claims; "and" may join its parts, and case and a full stop do not matter.

    Raises ValueError for other texts.
    """
    text = " ".join(prompt.lower().strip().rstrip(".").split())
    if text == "nothing":
        return Claim(())
    if related := _RELATED.fullmatch(text):
        colour, shape, how, other_colour, other_shape = related.groups()
        return Claim((f"{colour} {shape}", f"{other_colour} {other_shape}"), how)
    names = []
    for part in re.split(r", and |, | and ", text):
        counted = _COUNTED.fullmatch(part)
        if not counted:
            raise ValueError(
                f"the judge cannot read {part!r} in the prompt {prompt!r}. It reads inventories such as "
                '"a red circle, two blue squares" and relations such as "a red circle left of a blue square", with the '
                f"colours {', '.join(COLOURS)} and the shapes {', '.join(SHAPES)}."
            )
        amount, colour, shape = counted.groups()
        number = int(amount) if amount and amount.isdigit() else _AMOUNT.get(amount or "one", 1)
        names += [f"{colour} {shape}"] * number
    return Claim(tuple(names))


def score(prompt: str, scene: Scene) -> float:
    """How far a scene is what a prompt says, in [0, 1]; 1 if it shows exactly that and nothing else.

    The share of names that agree (F1 of the two multisets); a relation is a third fact beside the two names.
    Raises ValueError for a prompt that `read_prompt` cannot read.
    """
    claim = read_prompt(prompt)
    said, seen = Counter(claim.names), Counter(thing.name for thing in scene.things)
    total = said.total() + seen.total()
    agreement = 2 * (said & seen).total() / total if total else 1.0
    if claim.relation is None:
        return agreement
    first, second = claim.names
    holds = any(
        relation(one, other, scene.aspect) == claim.relation
        for one in scene.things
        for other in scene.things
        if one is not other and (one.name, other.name) == (first, second)
    )
    return (2 * agreement + holds) / 3


def satisfies(prompt: str, scene: Scene) -> bool:
    """Whether a scene shows exactly what a prompt says: these things, no others, and in this relation.

    Raises ValueError for a prompt that `read_prompt` cannot read.
    """
    return score(prompt, scene) == 1


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """All questions of the kinds colour, shape and place that have one answer, and counts, in random order.

    Counts are asked of everything present and of two things absent; a count above four is not asked.
    """
    shapes = [thing.shape for thing in scene.things]
    colours = [thing.colour for thing in scene.things]
    names = [thing.name for thing in scene.things]
    asked = []
    for thing in scene.things:
        if shapes.count(thing.shape) == 1:
            asked.append(Question("colour", f"what colour is the {thing.shape}?", thing.colour))
        if colours.count(thing.colour) == 1:
            asked.append(Question("shape", f"what shape is the {thing.colour} thing?", thing.shape))
        if names.count(thing.name) == 1:
            asked.append(Question("place", f"where is the {thing.name}?", thing.region))
    absent = [f"{shape}" for shape in SHAPES if shape not in shapes] + [c for c in COLOURS if c not in colours]
    absent = [absent[i] for i in rng.permutation(len(absent))[:2]]
    for name in [*dict.fromkeys(shapes), *dict.fromkeys(colours), *absent]:
        number = shapes.count(name) + colours.count(name)
        if number < len(NUMBERS):
            noun = f"{name} things" if name in PALETTE else _counted(0, name).removeprefix("zero ")
            asked.append(Question("count", f"how many {noun} are there?", NUMBERS[number]))
    return [asked[i] for i in rng.permutation(len(asked))]


def held_out(
    count: int,
    pixels: int | tuple[int, int] = 96,
    things: tuple[int, int] = (1, 5),
    sizes: tuple[float, float] | None = None,
    seed: int = 0,
) -> Iterator[tuple[Image, Question]]:
    """Evaluation pictures with one question each, the four kinds in turn: the same every time.

    Their seeds (`HELD_OUT_SEEDS`) are refused by `train_rng`.  Count answers are balanced too, as far as scenes allow.
    sizes: smallest and largest, of the shorter side; those of `sizes_at` if None.  seed: which of the held-out
    sequences; below 10,000,000.
    """
    rng = np.random.default_rng(HELD_OUT_SEEDS[seed])
    height, width = shape_of(pixels)
    for number in range(count):
        kind, wanted = KINDS[number % 4], NUMBERS[(number // 4) % 4]
        for attempt in range(1000):
            scene = sample_scene(rng, things, sizes or sizes_at(height, width), width / height)
            fitting = [
                question
                for question in questions(scene, rng)
                if question.kind == kind and (kind != "count" or question.answer == wanted or attempt > 50)
            ]
            if fitting:
                yield render(scene, (height, width)), fitting[0]
                break
