"""`mmaccel check` of a keyframe search: its laws hold on a real processor, and break where they should."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoProcessor
from typer.testing import CliRunner

import mmaccel
from mmaccel import pocket
from mmaccel.cli import app
from mmaccel.methods import Unsupported
from video import KeyframeSearch, TStar
from video import processors as reading
from video.pocket_haystack import make


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(pocket.path("pocket-llava"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    film = make(tmp_path_factory.mktemp("laws") / "film.mp4", seconds=40)
    return {"text": f"<video> {film.events[0].question}", "videos": str(film.path)}


@pytest.mark.parametrize("settings", [{}, {"search": TStar(rows=2, columns=2), "stamp": ""}, {"search": "bolt"}])
def test_the_laws_hold(processor, inputs, settings):
    report = mmaccel.check(processor, KeyframeSearch(frames=4, **settings), inputs=inputs)
    assert report.passed and len(report.laws) == 6, str(report)


def broken(processor, inputs):
    report = mmaccel.check(processor, KeyframeSearch(frames=4), inputs=inputs)
    return {law.law for law in report.laws if not law.passed}


def test_a_wrong_frame_breaks_the_first_law(processor, inputs, monkeypatch):
    right = reading.as_parts

    def wrong(found, stamp):
        parts = right(found, stamp)
        parts[1]["image"] = parts[1]["image"].transpose(0)
        return parts

    monkeypatch.setattr(reading, "as_parts", wrong)
    assert broken(processor, inputs) == {"the call is the plain one with the told frames, read afresh"}


def test_uncounted_looks_and_a_forgetful_second_call_break_theirs(processor, inputs, monkeypatch):
    calls = []
    right = KeyframeSearch.find

    def wrong(self, film, question=""):
        calls.append(question)
        self.detector([np.zeros((8, 8, 3), np.uint8)], ["red circle"])
        return right(self, film, question if len(calls) == 1 else "where is the thing?")

    monkeypatch.setattr(KeyframeSearch, "find", wrong)
    assert broken(processor, inputs) == {
        "the second call equals the first",
        "the ledger counts the pictures that the detector saw",
    }


def test_inputs_without_a_video_are_refused_with_an_example(processor):
    with pytest.raises(Unsupported, match=r"one text and one video file: inputs=.*'videos': 'film.mp4'.*got .*hello"):
        mmaccel.check(processor, KeyframeSearch(), inputs={"text": "hello"})


def test_the_command_checks_a_checkpoints_processor():
    said = CliRunner().invoke(app, ["check", "pocket-llava", "keyframes", "--set", "frames=3"])
    assert said.exit_code == 0, said.output
    assert "keyframes on pocket-llava: passed" in said.output and "remove restores" in said.output
