"""`mmaccel bench video` on small videos: its figures are what an outside count says, and its parts run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mmaccel.bench import BenchResult, get_bench
from mmaccel.pocket import world
from tests.video.tables import Table
from video import Film, bench_growth, bench_reading
from video.bench import VideoBench
from video.bench_growth import _blind_orders, _looks_of
from video.bench_quality import IMAGINED, Imperfect, haystack
from video.bench_reading import film_of_numbers, number_of
from video.detectors import confidences, detect
from video.reader import open_video
from video.tables import TableHaystack, table_of
from video.tstar import TStar


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the benches of this file keep their videos."""
    return tmp_path_factory.mktemp("bench")


def test_quality_is_what_the_rows_say(folder, tmp_path):
    result = VideoBench(part="quality", minutes="4", videos=1, folder=str(folder)).run()
    figures, rows = result.figures, result.rows
    assert {row["search"] for row in rows} >= {"tstar", "uniform", "dense-retrieval@equal", "aks", "bolt"}
    ours = [row for row in rows if row["search"] == "tstar"]
    assert len(ours) == 10 and figures["recall.tstar.4"].value == np.mean([row["recall"] for row in ours])
    assert figures["recall.tstar.4"].value > figures["recall.uniform.4"].value
    assert figures["share.uniform.4"].value == 0 and figures["share.dense-retrieval.4"].value == 1
    for one, other in zip(ours, [row for row in rows if row["search"] == "bolt@equal"], strict=True):
        assert other["frames"] == max(one["frames"], 8) and one["hit"] >= one["recall"] >= 0
    assert 0.4 < figures["cell_recall"].value < 0.9
    result.save(tmp_path / "result.json")
    assert BenchResult.load(tmp_path / "result.json").figures == figures
    VideoBench(frames=8).plot(result, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.size[0] > 500


def test_every_frame_that_is_timed_is_the_right_one(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_reading, "FRAMES", 8)
    result = VideoBench(part="reading", reading_seconds=12, rounds=1, folder=str(tmp_path)).run()
    assert result.figures["wrong_frames.scattered"].value == result.figures["wrong_frames.clustered"].value == 0
    assert result.figures["reading.scattered"].value > 0 < result.figures["reading_seconds.clustered"].value
    with pytest.raises(ValueError, match=r"the plot shows recall, and this run measured none; set part=quality"):
        VideoBench().plot(result, tmp_path / "plot.png")


def test_the_numbers_of_the_timed_video_are_read_back(tmp_path):
    with open_video(film_of_numbers(tmp_path / "numbers.mp4", 2)) as video:
        frames = video.frames_at([0.0, 1.0, 59 / 30 + 0.001])
    assert [number_of(picture) for picture in frames.pictures] == [0, 30, 59]


@pytest.mark.slow
def test_the_other_parts_run(folder, monkeypatch):
    monkeypatch.setattr(bench_growth, "SHORT", 240)
    monkeypatch.setattr(bench_reading, "MEMORY_MINUTES", (4, 8))
    settings = {"minutes": "4", "videos": 1, "folder": str(folder)}
    growth = VideoBench(part="growth", **settings).run().figures
    assert growth["scaled_seconds"].value > 0 < growth["scaled_looks"].value and growth["looks.tstar.4"].value < 240
    memory = VideoBench(part="memory", **settings).run().figures
    assert 0 < memory["peak_mb.4"].value < 150 and 0 < memory["peak_mb.8"].value < 150
    answers = VideoBench(part="answers", **settings).run().figures
    assert answers["accuracy.tstar"].value > answers["accuracy.uniform"].value


def test_the_imperfect_detector_misses_and_imagines_as_often_as_it_says():
    names = ["red circle", "blue cross"]
    scene = world.Scene((world.Thing("circle", "red", 0.5, 0.5, 0.3),))
    rng = np.random.default_rng(0)
    pictures = [world.render(scene, 96) + rng.integers(0, 3, (96, 96, 3)).astype(np.uint8) for _ in range(200)]
    detector = Imperfect(recall=0.7, false=0.05)
    found = confidences(detect(detector, pictures, names), 2)
    assert (found[:, 0] > IMAGINED).mean() == pytest.approx(0.7, abs=0.08)
    assert (found[:, 1] > 0).mean() == pytest.approx(0.05, abs=0.04) and found[:, 1].max() <= IMAGINED
    assert np.array_equal(confidences(detect(detector, pictures[:9], names), 2), found[:9])


def test_a_table_says_what_the_detector_says_of_every_second(folder):
    made = haystack(folder, 240, 0)
    names = [event.target.name for event in made.events]
    with Film(made.path) as film:
        table = table_of(film, "colour-shape", names)
    for event, column in zip(made.events, table.T, strict=True):
        seconds = np.flatnonzero(column)
        assert event.target.begin - 0.3 <= seconds.min() and seconds.max() <= event.target.end + 0.3


def test_a_table_is_looked_at_no_more_than_its_budget():
    rng = np.random.default_rng(0)
    cells = rng.random((50, 2))
    ours = TableHaystack(cells, np.array([1.0, 0.5]), 20)
    TStar(threshold=0.99).search(ours, 4)
    theirs = Table(cells, budget=20)
    TStar(threshold=0.99).search(theirs, 4)
    assert ours.looks == len(theirs.looked) + len(theirs.verified) <= 20


@pytest.mark.parametrize("total", [1, 7, 100])
def test_a_blind_order_looks_at_everything_once(total):
    for name, order in _blind_orders(total).items():
        assert sorted(order) == list(range(total)), name
    assert _looks_of(np.array([2, 0, 1]), np.array([0.9, 0.0, 0.3])) == 2 + 2


def test_the_bench_is_found_and_refuses_what_makes_no_sense():
    assert get_bench("video").from_options({"part": "reading", "rounds": "2"}) == VideoBench(part="reading", rounds=2)
    with pytest.raises(ValueError, match="videos and frames are at least 1; got 0 and 8"):
        VideoBench(videos=0)
    with pytest.raises(ValueError, match="has four clusters of 10 s, so it is longer than that; got 10"):
        VideoBench(reading_seconds=10)
    assert json.dumps(VideoBench.options())
