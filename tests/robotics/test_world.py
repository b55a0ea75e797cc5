"""The tabletop: the same seed is the same episode, what is drawn is what is there, and wrong calls say so."""

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from mmaccel.pocket import world
from robotics.world import DISCS, REACH, STEPS, Physics, PushWorld, Tabletop, Task, place, sample_task, several
from robotics.world import Camera as TopCamera

RIGHT, LEFT = np.array([1.0, 0.0]), np.array([-1.0, 0.0])


def test_gymnasium_finds_nothing_wrong_with_it():
    """Its checker raises, or warns; what it says of a world that was made without a name is no fault."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_env(PushWorld())
    assert [str(one.message) for one in said if "the environment not having a spec" not in str(one.message)] == []


def test_the_same_seed_and_actions_are_the_same_episode():
    actions = np.random.default_rng(0).uniform(-1, 1, (12, 2))

    def play():
        env = PushWorld()
        seen = [env.reset(seed=3)[0]["image"], *(env.step(action)[0]["image"] for action in actions)]
        return np.stack(seen), env.table

    (first, table), (second, other) = play(), play()
    assert np.array_equal(first, second) and table == other
    assert not np.array_equal(first, np.stack([PushWorld().reset(seed=4)[0]["image"]] * len(first)))


def test_the_camera_shows_every_thing_where_it_lies():
    table, _ = sample_task(np.random.default_rng(5))
    seen = world.parse(TopCamera(table.background).see(table))
    names = sorted(thing.name for thing in table.scene.things)
    assert sorted(thing.name for thing in seen.things) == names
    for thing in seen.things:
        assert min(np.hypot(*(place(thing) - place(true))) for true in table.scene.things) < 0.01


@pytest.mark.parametrize("seed", range(5))
def test_a_task_names_what_lies_on_the_table_and_is_not_done_yet(seed):
    table, task = sample_task(np.random.default_rng(seed))
    disc, square = table.discs[task.disc], table.squares[task.square]
    assert task.instruction(table) == f"push the {disc.colour} disc onto the {square.colour} square"
    assert not task.done(table)
    assert 2 <= len(table.discs) + len(table.squares) <= 4


def one_disc(x: float, pusher: float) -> Tabletop:
    disc = world.Thing("circle", "red", x, 0.5, DISCS[0])
    square = world.Thing("square", "blue", 0.8, 0.5, 0.2)
    return Tabletop((square,), (disc,), world.Thing("circle", "white", pusher, 0.5, 0.115))


def test_a_push_moves_the_disc_before_the_pusher_and_what_is_not_touched_stays():
    physics = Physics(one_disc(0.5, 0.36))
    for _ in range(4):
        physics.step(RIGHT)
    moved = physics.table
    assert moved.pusher.x == pytest.approx(0.36 + 4 * REACH)
    assert moved.pusher.y == pytest.approx(0.5)
    assert moved.discs[0].x - moved.pusher.x >= (moved.discs[0].size + moved.pusher.size) / 2 - 0.01
    assert moved.discs[0].y == pytest.approx(0.5, abs=1e-6)
    still = Physics(one_disc(0.5, 0.2))
    still.step(LEFT)
    assert still.table.discs == one_disc(0.5, 0.2).discs


def test_the_pusher_goes_as_far_as_it_is_told_or_may():
    physics = Physics(one_disc(0.9, 0.2))
    physics.step([-0.6, 0.3])
    assert place(physics.table.pusher) == pytest.approx((0.2 - 0.6 * REACH, 0.5 + 0.3 * REACH))
    physics.step([-3.0, 4.0])
    assert place(physics.table.pusher) == pytest.approx((0.2 - 1.2 * REACH, 0.5 + 1.1 * REACH))
    for _ in range(4):
        physics.step([-0.8, 0.6])
    assert place(physics.table.pusher) == pytest.approx((0.115 / 2, 0.5 + 3.5 * REACH))


def test_a_disc_comes_to_rest():
    physics = Physics(one_disc(0.5, 0.36))
    for action in [RIGHT] * 3 + [LEFT] * 10:
        physics.step(action)
    rest = physics.table.discs
    physics.step(LEFT)
    assert np.allclose(place(physics.table.discs[0]), place(rest[0]), atol=1e-6)


def test_an_episode_ends_in_success_or_is_cut_off():
    env = PushWorld()
    env.reset(seed=0)
    for step in range(STEPS):
        _, reward, terminated, truncated, info = env.step(np.ones(2))
        assert (reward, terminated, info["success"]) == (0, False, False)
        assert truncated == (step == STEPS - 1)
    assert Task(0, 0).done(one_disc(0.8, 0.2)) and not Task(0, 0).done(one_disc(0.69, 0.2))


def test_several_worlds_are_each_what_they_are_alone():
    together = several(3)
    together.reset(seed=[7, 8, 9])
    alone = [PushWorld() for _ in range(3)]
    for number, env in enumerate(alone):
        env.reset(seed=7 + number)
    actions = np.random.default_rng(1).uniform(-1, 1, (5, 3, 2))
    for rows in actions:
        pictures = together.step(rows)[0]["image"]
        own = [env.step(action)[0]["image"] for env, action in zip(alone, rows, strict=True)]
        assert np.array_equal(pictures, np.stack(own))


def test_a_step_before_an_episode_or_with_a_wrong_action_says_so():
    env = PushWorld()
    with pytest.raises(RuntimeError, match=r"no episode is running: call reset\(seed=...\) first"):
        env.step(np.zeros(2))
    env.reset(seed=0)
    for action in (np.zeros(3), np.array([np.nan, 0.0])):
        with pytest.raises(ValueError, match=r"a way, right and down, two finite numbers in \[-1, 1\]; got"):
            env.step(action)
