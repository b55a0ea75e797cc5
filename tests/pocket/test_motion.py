"""Laws of moving scenes: what moves is read back as it moves, and the judge of clips agrees with the captions."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmaccel.pocket import motion, world
from mmaccel.pocket.motion import Motion, MovingScene

SEEDS = st.integers(0, 2**31)


@given(seed=SEEDS, frames=st.sampled_from([4, 8, 16]), pixels=st.sampled_from([32, 48]))
@settings(max_examples=12, deadline=None)
def test_a_rendered_clip_reads_as_its_scene_and_satisfies_its_caption(seed, frames, pixels):
    scene = motion.sample_moving(np.random.default_rng(seed))
    clip = motion.render_moving(scene, frames, pixels)
    assert clip.shape == (frames, pixels, pixels, 3)
    read = motion.parse_moving(clip)
    moved = {thing.name: how for thing, how in zip(read.first.things, read.motions, strict=True)}
    for thing, how in zip(scene.first.things, scene.motions, strict=True):
        assert moved[thing.name].direction == how.direction
        assert moved[thing.name].travel == pytest.approx(how.travel, abs=0.02)
    assert motion.satisfies_motion(motion.caption(scene), clip)


@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_a_clip_played_backwards_moves_the_other_way(seed):
    scene = motion.sample_moving(np.random.default_rng(seed), (1, 1))
    clip = motion.render_moving(scene)[::-1]
    said = motion.caption(scene)
    assert motion.satisfies_motion(said, clip) == ("still" in said)
    assert motion.score_motion(said, clip) == (1 if "still" in said else 0.5)


@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_a_frame_that_lacks_a_thing_fails_the_clip(seed):
    scene = motion.sample_moving(np.random.default_rng(seed))
    clip = motion.render_moving(scene)
    clip[3] = world.render(world.Scene(()), 32, texture=False)
    assert not motion.satisfies_motion(motion.caption(scene), clip)
    assert 0 < motion.score_motion(motion.caption(scene), clip) < 1


def test_things_of_one_name_are_told_apart_by_where_they_were():
    thing = world.Thing("circle", "red", 0.2, 0.25, 0.25)
    first = world.Scene((thing, replace(thing, x=0.7, y=0.75)))
    clip = motion.render_moving(MovingScene(first, (Motion("right", 0.4), Motion("left", 0.4))))
    assert motion.satisfies_motion("a red circle moving left and a red circle moving right", clip)
    assert not motion.satisfies_motion("a red circle moving left, a red circle moving left", clip)


@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_things_stay_inside_and_apart(seed):
    scene = motion.sample_moving(np.random.default_rng(seed))
    for time in np.linspace(0, 1, 15):
        assert len(world.parse(world.render(scene.at(float(time)), 32, texture=False)).things) == len(
            scene.first.things
        )


@pytest.mark.parametrize("prompt", ["a red circle", "a red circle moving away", "a dog moving left"])
def test_an_unreadable_prompt_is_refused_with_what_can_be_read(prompt):
    with pytest.raises(ValueError, match=r"the judge cannot read '.*' in the prompt '.*'\. It reads"):
        motion.read_prompt(prompt)


def test_evaluation_prompts_name_one_and_two_things_in_turn():
    prompts = motion.prompts(20)
    assert prompts == motion.prompts(20)
    assert [len(motion.read_prompt(prompt)) for prompt in prompts] == [1, 2] * 10
