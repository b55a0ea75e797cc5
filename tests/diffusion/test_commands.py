"""`mmaccel generate` on a tiny pipeline, and what it says about wrong arguments."""

import json
import os
import signal
import threading

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffusion.loading import load
from diffusion.pictures import save, sheet
from mmaccel.cli import app
from tests.diffusion.tiny import fresh, stable_diffusion_3

SIZE = ["--call", "height=16", "--call", "width=16", "--call", "max_sequence_length=12"]


def mmaccel(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def complaint(result):
    assert result.exit_code == 2, result.stdout + result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("error")][-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipelines") / "sd3"
    fresh(stable_diffusion_3).save_pretrained(path)
    return path


def generated(folder, output, *more):
    return mmaccel(
        "generate", "--model", folder, "--prompt", "four red squares", "--output", output, "--steps", 3,
        "--reward", "brightness", *SIZE, *more,
    )  # fmt: skip


def test_a_search_writes_picture_finalists_curve_and_report(folder, tmp_path):
    result = generated(folder, tmp_path, "--method", "best-of-n", "--set", "n=3", "--seed", 7)
    assert result.exit_code == 0, result.stderr
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["denoiser_rows"] == 3 * 3 * 2 and len(data["finalists"]) == 3
    assert data["methods"][0]["reward"] == {"reward": "brightness"}
    assert Image.open(tmp_path / "best.png").size == (16, 16)
    for name in ("finalists.png", "reward.png"):
        assert Image.open(tmp_path / name).width > 100
    assert str(data["finalists"][0]["seed"]) in result.stdout


def test_the_same_seed_gives_the_same_picture(folder, tmp_path):
    for name in ("one", "two"):
        generated(folder, tmp_path / name, "--method", "latent-beam-search", "--set", "eta=1.0", "--set", "lookahead=1")
    assert (tmp_path / "one" / "best.png").read_bytes() == (tmp_path / "two" / "best.png").read_bytes()


def test_an_interrupt_keeps_the_best_so_far(folder, tmp_path, monkeypatch):
    from diffusion.rewards import Brightness

    plain, calls = Brightness.__call__, []

    def interrupting(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Brightness, "__call__", interrupting)
    assert threading.current_thread() is threading.main_thread()
    result = generated(folder, tmp_path, "--method", "rollover-budget-forcing", "--nfe", 200)
    assert result.exit_code == 0, result.stderr
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["stopped"] and data["denoiser_rows"] < 100
    assert (tmp_path / "best.png").exists()
    assert "the best sample so far is kept" in result.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "best-of-n", "--nfe", 100], "best-of-n has no setting nfe.*--set: reward"),
        (["--method", "hired"], "hired is no search of a diffusers pipeline"),
        (["--method", "best-of-m"], "no method 'best-of-m'; did you mean 'best-of-n'"),
        (["--reward", "clipscore"], "did you mean 'clip-score'"),
        (["--call", "guidance"], "written name=value, e.g. guidance_scale=3; got 'guidance'"),
        (["--nfe", 4], "nfe=4 leaves no try for some step"),
    ],
)
def test_wrong_arguments_are_one_line(folder, tmp_path, more, message):
    import re

    assert re.search(message, complaint(generated(folder, tmp_path, *more)))


def test_a_folder_that_is_no_pipeline_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no pipeline 'nowhere'; give a folder .* or a pocket model"):
        load("nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"holds no model_index.json; give the folder that pipeline.save_pretrained wrote"
    ):
        load(folder / "vae")
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises((ValueError, AttributeError), match=r"cannot be read|NoSuchPipeline"):
        load(tmp_path)


def test_pictures_and_videos_are_written_as_they_are(tmp_path):
    picture = torch.rand(3, 5, 7)
    with Image.open(save(picture, tmp_path / "a")) as image:
        assert image.size == (7, 5) and image.getpixel((6, 4)) == tuple((picture[:, 4, 6] * 255).round().int().tolist())
    with Image.open(save(torch.rand(4, 3, 5, 7), tmp_path / "b")) as image:
        assert image.n_frames == 4
    assert sheet(torch.rand(8, 3, 32, 32), [str(n) for n in range(8)]).size == (6 * 192, 2 * (192 + 16))
    assert sheet(torch.rand(2, 2, 3, 96, 96), ["one", "two"]).size == (2 * 192, 2 * 192 + 16)
