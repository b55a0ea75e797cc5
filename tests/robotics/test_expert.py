"""The expert: what it does depends on six numbers alone, smoothly, and it nearly always succeeds."""

import numpy as np
import pytest

from mmaccel.pocket import world
from robotics import expert
from robotics.world import REACH, PushWorld, sample_task


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


TABLES = [expert.where(*sample_task(np.random.default_rng(seed))) for seed in range(20)]


@pytest.mark.parametrize("where", TABLES)
def test_it_turns_with_the_table_and_mirrors_with_it(where):
    quarter, mirror = np.array([[0.0, -1.0], [1.0, 0.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])
    for change in (quarter, mirror):
        changed = [0.5 + change @ (point - 0.5) for point in where]
        assert expert.heading(*changed) == pytest.approx(change @ expert.heading(*where))


def test_nearby_tables_are_answered_nearly_alike_unless_the_pusher_is_right_in_front():
    rng = np.random.default_rng(0)
    disc, square, pusher = rng.uniform(0.1, 0.9, (3, 5000, 2))
    way, offset = expert.unit(square - disc), expert.unit(pusher - disc)
    fair = (expert.dot(way, offset) < 0.95)[:, 0]
    for near, other in ((disc, square), (disc, pusher)):
        fair &= np.hypot(*(near - other).T) > 0.12
    moved = [point + 1e-4 * expert.unit(rng.normal(size=(5000, 2))) for point in (disc, square, pusher)]
    turned = np.hypot(*(expert.heading(*moved) - expert.heading(disc, square, pusher)).T)
    assert fair.sum() > 2000 and turned[fair].max() < 60e-4


def test_behind_the_disc_it_goes_straight_for_the_square_and_elsewhere_around():
    disc, square = np.array([0.5, 0.5]), np.array([0.8, 0.5])
    assert expert.heading(disc, square, np.array([0.36, 0.5])) == pytest.approx([1, 0])
    on_ring = disc + expert.RING * np.array([0.0, 1.0])
    assert expert.heading(disc, square, on_ring) == pytest.approx([-1, 0])


def test_a_chunk_of_several_tables_is_what_it_does_step_by_step():
    disc, square, pusher = (np.stack(points) for points in zip(*TABLES, strict=True))
    actions = expert.chunk(disc, square, pusher, 3)
    assert actions.shape == (20, 3, 2)
    assert np.array_equal(actions[:, 0], expert.heading(disc, square, pusher))
    walked = pusher + REACH * actions[:, 0]
    free = (np.abs(walked - 0.5).max(-1) < 0.4) & (np.hypot(*(walked - disc).T) > 0.14)
    assert free.sum() > 10
    assert actions[free, 1] == pytest.approx(expert.heading(disc, square, walked)[free])


def test_a_chunk_expects_the_disc_to_be_pushed():
    disc, square = np.array([0.5, 0.5]), np.array([0.8, 0.5])
    actions = expert.chunk(disc, square, np.array([0.34, 0.5]), 4)
    assert actions == pytest.approx(np.tile([1.0, 0.0], (4, 1)))
