"""The expert: what it does depends on the tabletop alone, and it nearly always succeeds."""

import numpy as np
import pytest

from mmaccel.pocket import world
from robotics import expert
from robotics.world import Physics, PushWorld, sample_task


def succeeds(seed: int, noise: float = 0.0) -> bool:
    env, rng, over = PushWorld(), np.random.default_rng(seed), False
    env.reset(seed=seed)
    while not over:
        action = expert.act(env.table, env.task) + noise * rng.normal(size=2)
        _, _, success, late, _ = env.step(action)
        over = success or late
    return success


def test_it_succeeds_on_held_out_episodes():
    assert np.mean([succeeds(seed) for seed in world.HELD_OUT_SEEDS[:40]]) > 0.95


@pytest.mark.slow
def test_it_succeeds_on_hundreds_of_held_out_episodes_led_astray_or_not():
    assert np.mean([succeeds(seed) for seed in world.HELD_OUT_SEEDS[:400]]) > 0.99
    assert np.mean([succeeds(seed, noise=0.3) for seed in world.HELD_OUT_SEEDS[:400]]) > 0.95


def test_a_chunk_is_what_it_does_step_by_step():
    table, task = sample_task(np.random.default_rng(2))
    physics, actions = Physics(table), expert.chunk(table, task, 5)
    for action in actions:
        assert np.array_equal(action, expert.act(physics.table, task))
        physics.step(action)
    assert actions.shape == (5, 2) and np.abs(actions).max() <= 1


@pytest.mark.parametrize(("start", "expected"), [((0.1, 0.5), (0.9, 0.5)), ((0.1, 0.9), (0.9, 0.9))])
def test_a_way_past_a_circle_is_straight_where_it_is_free(start, expected):
    found = expert.around(np.array(start), np.array(expected), np.array([0.5, 0.2]), 0.1)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("height", [0.45, 0.55])
def test_a_way_past_a_circle_touches_it_on_the_shorter_side(height):
    start, centre, radius = np.array([0.1, height]), np.array([0.5, 0.5]), 0.1
    touched = expert.around(start, np.array([0.9, height]), centre, radius)
    assert np.hypot(*(touched - centre)) == pytest.approx(radius)
    assert (touched - centre) @ (touched - start) == pytest.approx(0, abs=1e-9)
    assert np.sign(touched[1] - 0.5) == np.sign(height - 0.5)


def test_from_inside_the_circle_it_goes_along_it():
    start, centre = np.array([0.42, 0.51]), np.array([0.5, 0.5])
    following = expert.around(start, np.array([0.9, 0.51]), centre, 0.1)
    assert np.hypot(*(following - centre)) == pytest.approx(0.1)
    assert following[1] > start[1]
