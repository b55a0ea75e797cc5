"""The world's laws: the drawn can be read back, the asked has its answer, the held out is never trained on."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaccel.pocket import world
from mmaccel.pocket.world import Scene, Thing

SEEDS = st.integers(0, 2**31)


def assert_same(scene: Scene, read: Scene, height: int, width: int) -> None:
    """Every thing is found with its shape and colour, and to a fraction of a pixel."""
    assert len(read.things) == len(scene.things)
    for thing in scene.things:
        found = min(read.things, key=lambda other: np.hypot(other.x - thing.x, other.y - thing.y))
        assert (found.shape, found.colour, found.region) == (thing.shape, thing.colour, thing.region)
        assert max(abs(found.x - thing.x) * width, abs(found.y - thing.y) * height) < 0.6
        assert abs(found.size - thing.size) * min(height, width) < 1


@pytest.mark.parametrize(
    ("pixels", "texture", "things", "sizes"),
    [
        ((96, 96), True, (1, 5), world.SIZES),
        ((192, 192), True, (1, 5), world.SIZES),
        ((192, 192), True, (1, 7), (0.0575, 0.0885)),
        ((96, 192), True, (1, 6), world.SIZES),
        ((180, 130), True, (1, 6), (0.085, 0.13)),
        ((32, 32), False, (1, 5), world.SIZES),
        ((32, 32), False, (0, 3), world.LARGE),
        ((32, 32), True, (1, 3), world.LARGE),
    ],
)
def test_the_parser_reads_every_rendered_scene_exactly(pixels, texture, things, sizes):
    rng = world.train_rng(11)
    for _ in range(200):
        scene = world.sample_scene(rng, things, sizes, pixels[1] / pixels[0])
        assert_same(scene, world.parse(world.render(scene, pixels, texture)), *pixels)


def test_every_class_is_read_at_every_place_and_resolution():
    for shape, colour, (x, y), pixels in product(
        world.SHAPES, world.COLOURS, [(0.18, 0.21), (0.5, 0.5), (0.83, 0.77)], (32, 96)
    ):
        scene = Scene((Thing(shape, colour, x, y, 0.2),))
        assert_same(scene, world.parse(world.render(scene, pixels, texture=pixels == 96)), pixels, pixels)


def test_an_empty_scene_reads_as_empty_whatever_its_texture():
    assert not any(world.parse(world.render(Scene((), seed))).things for seed in range(300))


def test_the_parser_refuses_what_is_no_picture():
    with pytest.raises(ValueError, match=r"expected a uint8 picture \[height, width, 3\]; got float64 \[8, 8\]"):
        world.parse(np.zeros((8, 8)))


@given(seed=SEEDS, step=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_same_seed_gives_the_same_scene_and_picture(seed, step):
    if seed in world.HELD_OUT_SEEDS:
        return
    first, second = (world.sample_scene(world.train_rng(seed, step)) for _ in range(2))
    assert first == second
    assert np.array_equal(world.render(first), world.render(second))


@given(seed=SEEDS, aspect=st.floats(0.5, 2))
@settings(max_examples=100, deadline=None)
def test_things_keep_apart_and_clear_of_region_borders(seed, aspect):
    scene = world.sample_scene(np.random.default_rng(seed), (1, 5), aspect=aspect)
    shown = world.draw(scene, 96)[1]
    for number, thing in enumerate(scene.things, 1):
        alone = world.draw(Scene((thing,), 0, aspect), 96)[1]
        assert np.array_equal(shown == number, alone == 1)  # nothing covers it
        assert min(abs(place - border) for place in (thing.x, thing.y) for border in (1 / 3, 2 / 3)) >= world.BORDER
        rows, columns = np.nonzero(shown == number)
        assert rows.min() > 0 and columns.min() > 0
        assert rows.max() < shown.shape[0] - 1 and columns.max() < shown.shape[1] - 1


def test_a_scene_that_cannot_fit_is_refused():
    with pytest.raises(ValueError, match=r"9 things of size \(0.4, 0.5\) .* do not fit"):
        world.sample_scene(np.random.default_rng(0), (9, 9), (0.4, 0.5))


@given(seed=SEEDS)
@settings(max_examples=200, deadline=None)
def test_answers_agree_with_the_scene(seed):
    rng = np.random.default_rng(seed)
    scene = world.sample_scene(rng)
    for question in world.questions(scene, rng):
        words = question.text.removesuffix("?").split()
        if question.kind == "colour":
            (thing,) = [thing for thing in scene.things if thing.shape == words[-1]]
            assert question.answer == thing.colour
        elif question.kind == "shape":
            (thing,) = [thing for thing in scene.things if thing.colour == words[-2]]
            assert question.answer == thing.shape
        elif question.kind == "place":
            (thing,) = [thing for thing in scene.things if thing.name == " ".join(words[-2:])]
            row = 1 + (thing.y > 2 / 3) - (thing.y < 1 / 3)
            column = 1 + (thing.x > 2 / 3) - (thing.x < 1 / 3)
            said = f"{['top', '', 'bottom'][row]} {['left', '', 'right'][column]}".strip()
            assert question.answer == (said or "middle")
        else:
            name = words[2] if words[3] == "things" else words[2].removesuffix("s").removesuffix("e")
            names = {"circl": "circle", "squar": "square", "triangl": "triangle"}
            name = names.get(name, name)
            number = sum(name in (thing.shape, thing.colour) for thing in scene.things)
            assert world.NUMBERS.index(question.answer) == number


@given(seed=SEEDS)
@settings(max_examples=100, deadline=None)
def test_captions_are_true_of_the_scene(seed):
    scene = world.sample_scene(np.random.default_rng(seed))
    inventory, *relations = world.captions(scene)
    counted = {}
    for part in inventory.split(", "):
        number, colour, shape = part.split()
        singular = shape if number == "a" else shape.removesuffix("es" if "cross" in shape else "s")
        counted[f"{colour} {singular}"] = 1 if number == "a" else [*world.NUMBERS, "5"].index(number)
    names = [thing.name for thing in scene.things]
    assert counted == {name: names.count(name) for name in names}
    for caption in relations:
        how = next(how for how in world.RELATIONS if f" {how} " in caption)
        first, second = (
            next(thing for thing in scene.things if f"a {thing.name}" == part) for part in caption.split(f" {how} ")
        )
        axis, sign = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}[how]
        assert sign * (getattr(first, axis) - getattr(second, axis)) > 0


@pytest.mark.parametrize("seed", [world.HELD_OUT_SEEDS.start, world.HELD_OUT_SEEDS.stop - 1])
def test_training_refuses_the_held_out_seeds(seed):
    with pytest.raises(ValueError, match=f"held out for evaluation; got {seed}. Train with a seed outside"):
        world.train_rng(seed)


def test_held_out_pictures_are_balanced_repeatable_and_none_that_training_saw():
    held = list(world.held_out(80))
    assert [question.kind for _, question in held] == list(world.KINDS) * 20
    again = list(world.held_out(80))
    assert all(np.array_equal(one, other) and a == b for (one, a), (other, b) in zip(held, again, strict=True))
    pictures = {image.tobytes() for image, _ in held}
    assert len(pictures) == 80
    for seed, step in product(range(1, 4), range(5)):
        rng = world.train_rng(seed, step)
        assert not pictures & {world.render(world.sample_scene(rng)).tobytes() for _ in range(8)}


def test_a_whole_number_of_pixels_means_the_shorter_side():
    assert world.render(Scene((), 0, 2.0), 96).shape == (96, 192, 3)
    assert world.render(Scene((), 0, 0.5), 96).shape == (192, 96, 3)
