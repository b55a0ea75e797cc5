"""`mmaccel keyframes`: what it prints, what it writes, and what it says about wrong arguments."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mmaccel.cli import app
from tests.video.films import film, steady
from video.sheets import clock


def mmaccel(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_times_scores_and_pictures_of_what_was_found(haystack, tmp_path):
    event = haystack.events[0]
    result = mmaccel(
        "keyframes", haystack.path, "--find", event.target.name, "--near", "white thing", "--frames", 5,
        "--output", tmp_path / "new",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    facts = json.loads((tmp_path / "new" / "keyframes.json").read_text())
    second = facts["verified"][event.target.name]
    assert event.target.begin - 0.2 <= second < event.target.end and len(facts["seconds"]) == 5
    assert f"verified: {event.target.name} at {clock(second)}" in result.stdout
    assert all(f"{time:.2f}" in result.stdout for time in facts["seconds"])
    assert f"looked at {facts['spent']['frames']} frames" in result.stdout and "of 120 seconds" in result.stdout
    with Image.open(tmp_path / "new" / "keyframes.png") as sheet:
        assert sheet.size == (4 * 240, 2 * 256)
        assert np.asarray(sheet.crop((0, 0, 240, 16))).min() < 128, "the caption is written"
    with Image.open(tmp_path / "new" / "scores.png") as curve:
        assert curve.size[0] > 500


def test_a_search_that_looks_at_nothing_draws_no_curve(haystack, tmp_path):
    result = mmaccel("keyframes", haystack.path, "--find", "circle", "--search", "uniform", "--output", tmp_path)
    assert result.exit_code == 0 and "no curve was drawn: this search looked at nothing" in result.stderr
    assert not (tmp_path / "scores.png").exists() and "looked at 0 frames" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--find", "dog"], r"colour-shape cannot read 'dog'"),
        (["--find", "circle", "--search", "t-star"], r"did you mean 'tstar'"),
        (["--find", "circle", "--budget", "0"], r"a share of the video's seconds in (0, 1]"),
        (["--find", "circle", "--model", "none"], r"there is no checkpoint folder 'none'"),
        (["--find", "circle", "--frames", "2000"], r"2000 frames were asked for"),
    ],
)
def test_wrong_arguments_end_in_one_line(haystack, tmp_path, arguments, message):
    result = mmaccel("keyframes", haystack.path, "--output", tmp_path, *arguments)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())


def test_what_is_no_video_ends_in_one_line(tmp_path):
    (tmp_path / "notes.mp4").write_text("words")
    for name, message in (("notes.mp4", "cannot be read as a video"), ("none.mp4", "there is no video")):
        result = mmaccel("keyframes", tmp_path / name, "--find", "circle")
        assert result.exit_code == 2 and message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("seconds", "written"), [(0, "0:00.0"), (65.04, "1:05.0"), (3725.5, "1:02:05.5"), (59.96, "1:00.0")]
)
def test_times_are_written_as_people_do(seconds, written):
    assert clock(seconds) == written


def test_a_whole_number_of_looks_is_a_budget(tmp_path):
    short = film(tmp_path / "clip.mp4", steady(500))
    result = mmaccel("keyframes", short, "--find", "circle", "--budget", "4", "--frames", 3, "--output", tmp_path)
    assert result.exit_code == 0 and "looked at 4 frames" in result.stdout
