"""Runs that end, errors as messages, models by name, files by content, and a folder that goes away."""

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

import mmaccel
from demos.serving import Runs, between, in_words, one_of, private_folder, short_text, streamed
from demos.shelf import Shelf, twin
from demos.uploads import checked_picture, checked_video
from mmaccel import pocket
from tests.checkpoints import save_llava


def test_a_run_ends_when_its_session_stops_it_or_its_time_is_over():
    runs = Runs(seconds=60)
    with runs.begin("mine") as mine, runs.begin("yours") as yours:
        runs.stop("mine")
        assert mine.is_set() and not yours.is_set()
    runs.stop("mine")
    with Runs(seconds=0.01).begin("late") as late:
        assert late.wait(10)


def test_a_stop_ends_a_run_that_has_not_begun_and_not_the_next_one():
    runs = Runs(seconds=60)
    runs.ask("mine")
    runs.stop("mine")
    with runs.begin("mine") as mine, runs.begin("yours") as yours:
        assert mine.is_set() and not yours.is_set()
    runs.ask("mine")
    with runs.begin("mine") as again:
        assert not again.is_set()
    runs.stop("mine")
    runs.leave("mine")
    with runs.begin("mine") as new:
        assert not new.is_set()


def test_what_work_shows_comes_in_order_and_its_error_last():
    def work(show):
        show(1)
        show(threading.current_thread().name)
        raise ValueError("no more")

    seen = []
    with pytest.raises(ValueError, match="no more"):
        for one in streamed(work):
            seen.append(one)
    assert seen[0] == 1 and seen[1] != threading.current_thread().name


def test_errors_of_a_wrong_input_are_told_and_others_are_kept_for_the_terminal(capsys):
    assert str(in_words(ValueError("give\n less"))) == "give less"
    assert "KeyError" in str(in_words(KeyError("secret"))) and "secret" not in str(in_words(KeyError("secret")))
    assert "secret" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: one_of("hird", ["hired", "tome"], "method"), "did you mean 'hired'"),
        (lambda: one_of(["hired"], ["hired"], "method"), "choose a method"),
        (lambda: short_text("  ", "a question"), "a question has 1 to 500 letters; got 0"),
        (lambda: short_text("x" * 501, "a question"), "got 501"),
        (lambda: between(1.5, 1, 9, "the number"), "the number is a whole number from 1 to 9; got 1.5"),
        (lambda: between(float("nan"), 1, 9, "the number"), "from 1 to 9; got nan"),
        (lambda: between(True, 0, 9, "the number"), "got True"),
    ],
)
def test_what_a_browser_sends_is_checked(wrong, message):
    with pytest.raises(ValueError) as refused:
        wrong()
    assert message in str(refused.value)


def test_only_what_was_offered_is_a_model(tmp_path):
    inside, outside = tmp_path / "models", tmp_path / "elsewhere"
    save_llava(inside / "mine")
    save_llava(outside / "secret")
    (inside / "link").symlink_to(outside / "secret")
    shelf = Shelf([inside])
    assert shelf.names(lambda folder: True) == [*pocket.names(), "mine"]
    assert shelf.folder("mine") == shelf.folder(str(inside / "mine")) == inside / "mine"
    for name in ("secret", str(outside / "secret"), "link", str(inside / "link"), "../elsewhere/secret", "", "/etc"):
        with pytest.raises(ValueError, match=r"start.*--models FOLDER"):
            shelf.folder(name)
    assert Shelf([inside / "mine"]).names(lambda folder: True)[-1] == "mine"


def test_twins_share_weights_and_nothing_else(tmp_path):
    from vision_tokens import HiRED, UniformTokens
    from vision_tokens.loading import load

    shelf = Shelf([save_llava(tmp_path / "mine").parent])
    first, second = (shelf.twin("mine", load)[0] for _ in range(2))
    assert first is not second
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one is other
    mmaccel.apply(first, HiRED(budget=0.25))
    mmaccel.apply(second, UniformTokens(budget=0.5))
    assert {type(method) for model in (first, second) for method in mmaccel.attachment.attached(model).methods} == {
        HiRED,
        UniformTokens,
    }
    assert twin((torch.nn.Linear(2, 2), None))[1] is None


def test_pictures_and_films_are_told_by_their_content(tmp_path):
    text, bomb, right = tmp_path / "text.png", tmp_path / "bomb.png", tmp_path / "no-ending"
    text.write_text("<svg/>")
    Image.new("1", (9000, 9000)).save(bomb)
    Image.new("L", (8, 4)).save(right, format="PNG")
    assert checked_picture(str(right)).size == (8, 4) and checked_picture(str(right)).mode == "RGB"
    with pytest.raises(ValueError, match="no picture of the kinds PNG, JPEG, WEBP"):
        checked_picture(str(text))
    with pytest.raises(ValueError, match="at most 40 million pixels; this one has 9000 x 9000"):
        checked_picture(str(bomb))
    for check in (checked_picture, checked_video):
        with pytest.raises(ValueError, match=r"choose a .* first"):
            check(None)
    with pytest.raises(ValueError, match="this file"):
        checked_video(str(text))


def test_the_private_folder_is_this_users_and_goes_away(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(KeyboardInterrupt), private_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        (folder / "upload").write_text("private")
        signal.raise_signal(signal.SIGTERM)
    assert not folder.exists()


def test_a_folder_of_models_that_is_none_is_named():
    script = "import sys; from mmaccel.cli import main; sys.argv = ['mmaccel', 'app', '--models', '/no/such']; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert "there is no folder '/no/such' of models to offer" in done.stderr
