"""The judge: what is drawn for a prompt satisfies it, changed scenes do not, and grades agree with verdicts."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaccel.pocket import world
from mmaccel.pocket.world import Scene, Thing

SEEDS = st.integers(0, 2**31)
KINDS = st.sampled_from(world.PROMPTS)


@given(seed=SEEDS, kind=KINDS)
@settings(max_examples=40, deadline=None)
def test_what_is_drawn_for_a_prompt_satisfies_it_also_when_read_from_its_picture(seed, kind):
    prompt, scene = world.sample_prompt(np.random.default_rng(seed), kind)
    assert world.satisfies(prompt, scene)
    assert world.satisfies(prompt, world.parse(world.render(scene, 32, texture=False)))


@given(seed=SEEDS, things=st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_inventories_are_satisfied_by_their_scene_alone(seed, things):
    scene = world.sample_scene(np.random.default_rng(seed), (things, things))
    inventory = world.captions(scene)[0]
    assert world.satisfies(inventory, scene)
    assert world.satisfies(inventory.replace("a ", "one ").replace(", ", " and "), scene)
    more = replace(scene, things=(*scene.things, Thing("cross", "white", 0.1, 0.1, 0.1)))
    assert not world.satisfies(inventory, more)
    if things:
        first, *others = scene.things
        other = replace(first, colour="red" if first.colour != "red" else "blue")
        assert not world.satisfies(inventory, replace(scene, things=tuple(others)))
        assert not world.satisfies(inventory, replace(scene, things=(other, *others)))


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_relations_hold_one_way_and_of_two_things_alone(seed):
    prompt, scene = world.sample_prompt(np.random.default_rng(seed), "relation")
    mirrored = replace(scene, things=tuple(replace(thing, x=1 - thing.x, y=1 - thing.y) for thing in scene.things))
    assert not world.satisfies(prompt, mirrored)
    assert world.score(prompt, mirrored) == pytest.approx(2 / 3)
    crowded = replace(scene, things=(*scene.things, Thing("cross", "white", 0.1, 0.1, 0.1)))
    assert not world.satisfies(prompt, crowded)


@given(seed=SEEDS, other=SEEDS, kind=KINDS)
@settings(max_examples=50, deadline=None)
def test_grades_lie_between_nothing_and_all_and_agree_with_the_verdict(seed, other, kind):
    prompt, _ = world.sample_prompt(np.random.default_rng(seed), kind)
    scene = world.sample_scene(np.random.default_rng(other))
    assert 0 <= world.score(prompt, scene) <= 1
    assert (world.score(prompt, scene) == 1) == world.satisfies(prompt, scene)
    assert world.score(prompt, Scene(())) == 0


def test_grades_count_the_things_that_agree():
    scene = Scene((Thing("circle", "red", 0.2, 0.5, 0.2), Thing("square", "blue", 0.8, 0.5, 0.2)))
    assert world.score("a red circle", scene) == pytest.approx(2 / 3)
    assert world.score("two red circles", scene) == pytest.approx(1 / 2)
    assert world.score("a red circle left of a blue square", scene) == 1
    assert world.score("nothing", Scene(())) == 1


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("A red circle, two blue squares.", ["red circle", "blue square", "blue square"]),
        ("one red circle and 2 blue squares", ["red circle", "blue square", "blue square"]),
        (
            "red circle, four white crosses, and a green triangle",
            ["red circle", *["white cross"] * 4, "green triangle"],
        ),
        ("nothing", []),
    ],
)
def test_prompts_may_be_said_in_other_ways(prompt, names):
    assert list(world.read_prompt(prompt).names) == names


@pytest.mark.parametrize("prompt", ["", "a cat", "a red circle beside a blue square", "a red circle, a dog"])
def test_an_unreadable_prompt_is_refused_with_what_can_be_read(prompt):
    with pytest.raises(ValueError, match=r"the judge cannot read '.*' in the prompt .* It reads inventories such as"):
        world.satisfies(prompt, Scene(()))


def test_evaluation_prompts_are_balanced_and_the_same_every_time():
    prompts = world.prompts(40, seed=1)
    assert prompts == world.prompts(40, seed=1) != world.prompts(40, seed=2)
    claims = [world.read_prompt(prompt) for prompt in prompts]
    assert all(len(set(claim.names)) == 1 and 2 <= len(claim.names) <= 4 for claim in claims[0::4])
    assert all(len(set(claim.names)) == 2 == len(claim.names) for claim in claims[1::4])
    assert all(len(set(claim.names)) > 1 and len(claim.names) == 3 for claim in claims[2::4])
    assert all(claim.relation in world.RELATIONS for claim in claims[3::4])
    assert {claim.relation is None for claim in (c for n, c in enumerate(claims) if n % 4 < 3)} == {True}
