"""The bench: paired episodes that are played once, settings by name, latencies that take turns."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import mmaccel
from mmaccel.bench import get_bench
from mmaccel.pocket.world import HELD_OUT_SEEDS
from robotics import bench_episodes, bench_latency
from robotics.baselines import FixedHorizon
from robotics.bench_episodes import compare, measure, play, worked_on
from robotics.bench_settings import LAYER, Setting, settings
from robotics.control import Controller
from robotics.pocket import look
from robotics.policies import Chunk
from robotics.vla_pruner import VLAPruner
from robotics.world import PushWorld
from tests.robotics.pushing import make_policy
from vision_tokens import FastV, HiRED, RandomTokens


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr("robotics.world.STEPS", 7)


def test_settings_are_methods_at_a_percentage():
    dense, cut, dropped, long = settings("fastv.12.5,random.25,fixed-horizon.6")
    assert (dense.name, dense.methods) == ("dense", ())
    assert long.methods == (FixedHorizon(least=6),)
    assert cut.methods == (FastV(kept_share=0.125, layer=LAYER),)
    assert dropped.methods == (RandomTokens(budget=0.25),)
    assert Setting.of("vla-pruner.25").methods == (VLAPruner(kept_share=0.25, layer=LAYER, window=1),)
    with pytest.raises(ValueError, match=r"a setting is dense, METHOD.PERCENT \(vla-pruner.25\) or METHOD.ACTIONS"):
        Setting.of("fastv")


def test_an_episode_is_what_it_is_alone_whoever_else_is_played(policy, short):
    seeds = [HELD_OUT_SEEDS[number] for number in range(3)]
    together = play(policy, seeds)
    assert together == [play(policy, [seed])[0] for seed in seeds]
    assert [row["calls"] for row in together] == [-(-row["steps"] // policy.execute) for row in together]


def test_success_is_what_the_world_says(policy, monkeypatch):
    from robotics import expert

    world = PushWorld()

    def knowing(self, inputs, generator=None, noise=None):
        actions = expert.chunk(*expert.where(world.table, world.task), self.horizon)
        return Chunk(torch.from_numpy(actions)[None].float(), torch.tensor([self.execute]))

    monkeypatch.setattr(type(policy), "act", knowing)
    monkeypatch.setattr(bench_episodes, "PushWorld", lambda: world)
    (row,) = play(policy, [HELD_OUT_SEEDS[0]])
    assert row["success"] and row["steps"] < 60


def test_steps_that_drop_nothing_count_as_such(policy, short):
    rows = play_with(policy, VLAPruner(kept_share=0.25, layer=2, window=1))
    pruned = (2 + 2 * 0.25) / 4
    assert [row["share"] for row in rows] == [pytest.approx((1 + 3 * pruned) / 4)] * 2


def test_a_longer_part_of_a_chunk_takes_fewer_calls(policy, short):
    rows = measure(policy, settings("fixed-horizon.4,fixed-horizon.1"), 1, 1, None)
    assert [row["calls"] for row in rows] == [4, 2, 7] and {row["share"] for row in rows} == {1.0}


def play_with(policy, method):
    with mmaccel.applied(policy.model, method):
        return play(policy, [HELD_OUT_SEEDS[number] for number in range(2)])


@pytest.mark.parametrize("method", [FastV(kept_share=0.25, layer=2), HiRED(budget=0.25)])
def test_the_share_worked_on_is_what_the_layers_held(policy, method):
    env = PushWorld()
    env.reset(seed=0)
    with mmaccel.applied(policy.model, method):
        Controller(policy).policy.reset()
        policy.act(policy.observe(look([env], [0])))
        expected = (2 + 2 * 0.25) / 4 if isinstance(method, FastV) else 0.25
        assert worked_on(policy, 1) == [expected]
    assert worked_on(policy, 2) == [1.0, 1.0]


def test_episodes_are_played_once_and_compared_pair_by_pair(policy, short, tmp_path):
    chosen = settings("random.25,fastv.25")
    rows = measure(policy, chosen, 3, 2, tmp_path)
    assert [row["episode"] for row in rows] == [0, 1, 2] * 3
    files = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert set(files) == {"dense.jsonl", "random.25.jsonl", "fastv.25.jsonl"}
    (tmp_path / "dense.jsonl").write_text("\n".join(files["dense.jsonl"].splitlines()[:-1]) + '\n{"episode": 2, "su')
    assert measure(policy, chosen, 3, 2, tmp_path) == rows
    assert json.loads(files["random.25.jsonl"].splitlines()[1])["share"] == 0.25
    figures = compare(rows)
    assert figures["success.dense"].value == np.mean([row["success"] for row in rows[:3]])
    assert {"success_over_dense.fastv.25", "success_over_random.fastv.25", "success_over_fastv.random.25"} <= set(
        figures
    )


def test_a_method_that_fails_more_is_said_to(policy):
    row = {"steps": 9, "calls": 3, "share": 1.0}
    rows = [{**row, "setting": "dense", "episode": number, "success": True} for number in range(20)]
    rows += [{**row, "setting": "fastv.25", "episode": number, "success": number % 2 == 0} for number in range(20)]
    figure = compare(rows)["success_over_dense.fastv.25"]
    assert figure.value == -0.5 and figure.high < 0


def test_latencies_are_taken_in_turns_with_an_oracle(monkeypatch, policy):
    monkeypatch.setattr(bench_latency, "load", lambda device: policy)
    monkeypatch.setattr("robotics.world.STEPS", 3)
    rows = bench_latency.measure("pocket", settings("vla-pruner.25"), rounds=5)
    assert [row["setting"] for row in rows] == ["dense", "vla-pruner.25", "vla-pruner.25 oracle"]
    assert [row["dense_steps"] for row in rows] == [0, 2, 0]
    assert all(len(row["seconds"]) == 5 for row in rows)
    figures = bench_latency.compare(rows)
    assert {"latency.dense", "speedup.vla-pruner.25", "p99_ratio.vla-pruner.25", "oracle_ratio.vla-pruner.25"} <= set(
        figures
    )
    assert figures["control.dense"].value == pytest.approx(policy.execute / figures["latency.dense"].value)
    assert not mmaccel.attachment.attached(policy.model)


def test_a_tail_that_is_longer_shows():
    even, rare = [1.0] * 200, [1.0] * 195 + [3.0] * 5
    rows = [{"setting": name, "execute": 3, "seconds": seconds} for name, seconds in (("dense", even), ("late", rare))]
    figures = bench_latency.compare(rows)
    assert figures["speedup.late"].value == 1 and figures["p99_ratio.late"].value == 3


@pytest.mark.parametrize(("shape", "said"), [("Z", "there is no shape 'Z'"), ("B", "cuts it into tiles; take A or A7")])
def test_shapes_that_are_none_or_have_tiles_are_refused(shape, said):
    with pytest.raises(ValueError, match=said):
        bench_latency.stand_in(shape, "cpu")


def test_the_bench_runs_by_its_options_and_draws(tmp_path, monkeypatch, policy, short):
    monkeypatch.setattr("robotics.pocket.load", lambda model, device: policy)
    bench = get_bench("robotics").from_options({"settings": "random.25,random.50", "episodes": 2})
    result = bench.run()
    bench.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="this run measured latency; set part=episodes"):
        replace(bench, part="latency").plot(result, tmp_path / "plot.png")
    with pytest.raises(ValueError, match="episodes, rows and rounds are at least 1; got 0, 32 and 100"):
        get_bench("robotics").from_options({"episodes": 0})
