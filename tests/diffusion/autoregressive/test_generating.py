"""`mmaccel generate` with autoregressive models: pictures of classes, where tokens come from, Ctrl-C, refusals."""

import json
import os
import re
import signal

import pytest
from PIL import Image
from typer.testing import CliRunner

from diffusion.autoregressive.painters import DiscretePainter
from mmaccel.cli import app
from tests.diffusion.autoregressive import folders


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return folders.continuous(tmp_path_factory.mktemp("mar"))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return folders.discrete(tmp_path_factory.mktemp("imagegpt"))


def generated(model, prompt, output, *more):
    arguments = ["generate", "--model", model, "--prompt", prompt, "--output", output, *more]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_picture_of_each_class_is_drawn_with_drafts(pair, tmp_path):
    result = generated(pair, "thing 3, 7", tmp_path, "--set", "length=2", "--call", "guidance=1.5", "--seed", 4)
    assert result.exit_code == 0, result.stderr
    drawn = json.loads((tmp_path / "report.json").read_text())
    assert [(one["picture"], one["seed"]) for one in drawn] == [("thing 3", 4), ("7", 5)]
    assert drawn[0]["methods"][0]["length"] == 2 and 0 <= drawn[0]["acceptance"] <= 1
    for name in ("picture-1.png", "picture-2.png"):
        assert Image.open(tmp_path / name).size == (3, 3)
    assert Image.open(tmp_path / "pictures.png").size == Image.open(tmp_path / "origins.png").size
    assert "tokens a round" in result.stdout and "a draft that was accepted" in result.stdout


def test_discrete_tokens_are_drawn_by_their_own_method(words, tmp_path):
    result = generated(words, "a red circle", tmp_path)
    assert result.exit_code == 0, result.stderr
    (drawn,) = json.loads((tmp_path / "report.json").read_text())
    assert drawn["methods"][0]["method"] == "speculative-jacobi" and drawn["passes"] <= 9
    assert Image.open(tmp_path / "picture-1.png").size == (6, 6)
    again = generated(words, "red circle", tmp_path / "again")
    assert again.exit_code == 0
    assert (tmp_path / "picture-1.png").read_bytes() == (tmp_path / "again" / "picture-1.png").read_bytes()


def test_rows_are_drawn_side_by_side_without_a_sheet_of_drafts(words, tmp_path):
    result = generated(
        words, "a red circle", tmp_path, "--method", "zipar", "--set", "window=1", "--set", "adaptive=false"
    )
    assert result.exit_code == 0, result.stderr
    (drawn,) = json.loads((tmp_path / "report.json").read_text())
    assert drawn["methods"][0]["method"] == "zipar" and drawn["passes"] == 5 and drawn["missing"] == 7 / 36
    assert drawn["row_length"] == 3 and not (tmp_path / "origins.png").exists()


def test_an_interrupt_keeps_the_pictures_so_far(words, tmp_path, monkeypatch):
    plain, drawn = DiscretePainter.draw, []

    def interrupting(self, *args, **kwargs):
        drawn.append(1)
        if len(drawn) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DiscretePainter, "draw", interrupting)
    result = generated(words, "0, 1, 2", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert len(json.loads((tmp_path / "report.json").read_text())) == len(drawn) == 2
    assert "the pictures so far are kept, and that in progress" in result.stderr


@pytest.mark.parametrize(
    ("prompt", "more", "message"),
    [
        ("a red sphere", [], "draws the classes 0 to 2; got 'a red sphere'"),
        ("0", ["--nfe", 10], r"--nfe is for searches of diffusers pipelines, and .* draws token after token; leave it"),
        ("0", ["--reward", "brightness"], "--reward is for searches"),
        ("0", ["--set", "windows=3"], "speculative-jacobi has no setting 'windows'; did you mean 'window'"),
        ("0", ["--method", "best-of-n"], "best-of-n"),
        ("0", ["--method", "speculative-jacobbi"], "did you mean 'speculative-jacobi'"),
    ],
)
def test_wrong_arguments_are_one_line(words, tmp_path, prompt, more, message):
    result = generated(words, prompt, tmp_path, *more)
    assert result.exit_code == 2, result.stdout + result.stderr
    assert re.search(message, [line for line in result.stderr.splitlines() if line.startswith("error")][-1])
