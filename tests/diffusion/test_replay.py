"""A finalist is made again, alone, from what the report says of it."""

import json

import pytest
import torch

import mmaccel
from diffusion import BestOfN, LatentBeamSearch, Replay, RolloverBudgetForcing, SearchOverPaths, ZeroOrderSearch
from tests.diffusion.tiny import brightness, call, pipeline, seeded

SEARCHES = {
    "best of n": BestOfN(brightness, 3, pictures=3),
    "beams": LatentBeamSearch(brightness, 2, 2, 1, eta=1.0, pictures=3),
    "rollover": RolloverBudgetForcing(brightness, 60, pictures=3),
    "paths": SearchOverPaths(brightness, 2, 2, pictures=3),
    "zero order": ZeroOrderSearch(brightness, 2, 2, pictures=3),
}


def found(case, search, seed=4):
    pipe = pipeline(case)
    with mmaccel.applied(pipe, search) as run:
        pipe(**call(case), generator=seeded(seed))
    return json.loads(json.dumps(run.report.to_dict()["finalists"])), run.report.details["pictures"][0]


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("case", ["stable-diffusion-3", "stable-diffusion"])
def test_every_finalist_is_made_again_alone(case, name):
    finalists, pictures = found(case, SEARCHES[name])
    assert len(pictures) == min(len(finalists), 3) >= 1
    pipe = pipeline(case)
    for finalist, picture in zip(finalists, pictures, strict=False):
        with mmaccel.applied(pipe, Replay(brightness, trail=finalist["trail"])) as run:
            (again,) = pipe(**call(case), generator=seeded(finalist["trail"]["seed"]))[0]
        torch.testing.assert_close(again, picture, atol=1e-5, rtol=0)
        assert run.report["reward"] == pytest.approx(finalist["reward"], abs=1e-5)
        if finalist["plain"]:
            (plain,) = pipe(**call(case), generator=seeded(finalist["seed"]))[0]
            torch.testing.assert_close(plain, picture, atol=1e-5, rtol=0)


def test_a_replay_costs_one_sample():
    finalists, _ = found("stable-diffusion-3", SEARCHES["beams"])
    pipe = pipeline("stable-diffusion-3")
    with mmaccel.applied(pipe, Replay(brightness, trail=finalists[0]["trail"])) as run:
        pipe(**call("stable-diffusion-3"), generator=seeded(4))
    assert run.report["denoiser_rows"] == run.report.to_dict()["denoiser_rows_dense"]


def test_another_seed_is_refused_with_the_right_one():
    finalists, _ = found("stable-diffusion-3", SEARCHES["best of n"])
    pipe = pipeline("stable-diffusion-3")
    replay = Replay(brightness, trail=finalists[0]["trail"])
    with (
        mmaccel.applied(pipe, replay),
        pytest.raises(ValueError, match=r"comes from seed 4, and the .* called with se"),
    ):
        pipe(**call("stable-diffusion-3"), generator=seeded(5))


def test_a_trail_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r'what a report says under "finalists".* missing here: chain, moves, sampled'):
        Replay(brightness, trail={"seed": 3})
