"""The shipped policy: an ordinary small checkpoint that knows where things are and brings discs onto squares."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mmaccel import pocket
from mmaccel.pocket.world import HELD_OUT_SEEDS
from robotics import expert
from robotics.bench_episodes import play
from robotics.pocket import THOUGHTS, load, look
from robotics.training import answer
from robotics.world import PushWorld


@pytest.fixture(scope="module")
def policy():
    return load()


def test_weights_are_small_halves_of_the_librarys_own_class_and_load_as_floats(policy):
    file = pocket.path("pocket-vla") / "model.safetensors"
    assert file.stat().st_size < 4e6
    with safe_open(file, "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118 (no mapping)
    assert type(policy.model).__module__.startswith("transformers.")
    assert type(policy.model).__name__ == "LlavaForConditionalGeneration"
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}


def test_it_says_where_things_are_on_tables_that_no_training_saw(policy):
    worlds = [PushWorld() for _ in range(24)]
    for world, seed in zip(worlds, HELD_OUT_SEEDS, strict=False):
        world.reset(seed=seed)
    policy.reset()
    inputs = policy.observe(look(worlds, range(len(worlds))))
    written = policy.model.generate(**inputs.model, max_new_tokens=THOUGHTS, min_new_tokens=THOUGHTS, do_sample=False)
    said = policy.bins.centres(written[:, -THOUGHTS:]).numpy()
    true = np.stack([answer(*expert.where(world.table, world.task))[:THOUGHTS] for world in worlds])
    places, ways = np.abs(said - true)[:, :6], np.abs(said - true)[:, 6:]
    assert np.median(places) / 2 < 0.03, "of the table"
    assert np.median(ways) < 0.15


@pytest.mark.slow
def test_it_succeeds_on_held_out_episodes(policy):
    rows = play(policy, HELD_OUT_SEEDS[:64])
    assert np.mean([row["success"] for row in rows]) >= 0.8
