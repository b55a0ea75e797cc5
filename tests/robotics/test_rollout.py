"""A filmed episode: a frame a step, and the patches that the policy worked on."""

import av
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mmaccel
from mmaccel.cli import app
from mmaccel.pocket.world import HELD_OUT_SEEDS
from robotics.pocket import look
from robotics.rollout import HOLD, RATE, frames, kept_patches, play, record
from robotics.world import PushWorld
from tests.robotics.pushing import make_policy, save_policy
from vision_tokens import FastV, HiRED, RandomTokens

SEED = HELD_OUT_SEEDS[0]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("robotics.world.STEPS", 5)


@pytest.mark.parametrize(
    ("methods", "kept"),
    [
        ((), 144),
        ((FastV(kept_share=0.25, layer=2),), 36),
        ((RandomTokens(budget=0.5),), 72),
        ((HiRED(budget=0.5), FastV(kept_share=0.25, layer=2)), 18),
    ],
)
def test_as_many_patches_are_bright_as_the_last_layer_held(policy, methods, kept):
    rollout = play(policy, SEED, methods)
    assert [int(cells.sum()) for cells in rollout.kept] == [kept] * 5
    assert rollout.calls == [1, 1, 2, 2, 3] and len(rollout.pictures) == 6


def test_the_bright_patches_are_those_of_the_report(policy):
    env = PushWorld()
    env.reset(seed=SEED)
    policy.reset()
    with mmaccel.applied(policy.model, HiRED(budget=0.25)) as run:
        inputs = policy.observe(look([env], [0]))
        policy.act(inputs)
        assert torch.equal(kept_patches(policy, inputs).flatten(), run.report.details["cells"][0][0])


def test_the_film_shows_every_step_and_holds_the_end(policy, tmp_path):
    rollout = record(policy, tmp_path / "film.mp4", SEED, [RandomTokens(budget=0.25)])
    with av.open(str(tmp_path / "film.mp4")) as file:
        stream = file.streams.video[0]
        seen = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
        assert stream.average_rate == RATE
    drawn = list(frames(rollout, "random"))
    assert len(seen) == len(drawn) == 5 + HOLD
    assert all(np.abs(one.astype(int) - other).mean() < 6 for one, other in zip(seen, drawn, strict=True))
    assert np.abs(seen[0].astype(int) - seen[5]).mean() > 0.1


def test_the_command_films_a_decorated_policy(tmp_path):
    model, film = save_policy(tmp_path / "model"), tmp_path / "film.mp4"
    said = CliRunner().invoke(
        app, ["rollout", "--model", str(model), "--method", "fastv", "--set", "kept_share=0.25", "--output", str(film)]
    )
    assert said.exit_code == 0, said.output
    assert "onto the" in said.output and "not done in 5 steps, 3 calls" in said.output
    assert film.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "film.gif"], "the video goes to an .mp4 file in a folder that exists; got --output film.gif"),
        (["--set", "budget=0.2"], "--set budget=0.2 needs a method that has this setting; add --method"),
    ],
)
def test_what_the_command_cannot_do_it_says(arguments, said):
    result = CliRunner().invoke(app, ["rollout", *arguments])
    assert result.exit_code == 2 and said in " ".join(result.stderr.split())
