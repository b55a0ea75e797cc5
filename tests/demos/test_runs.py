"""What the tabs run, without a page: what they show, that they stop, and that two at once do not meet."""

import threading

import pytest

from demos.acting import act_live
from demos.asking import ask_twice
from demos.forms import methods_of
from demos.moments import find_live
from demos.painting import paint_twice
from demos.searching import search_live
from demos.serving import example_file
from demos.shelf import Shelf, twin
from diffusion import BestOfN
from diffusion.autoregressive.painters import load_painter
from diffusion.rewards import Brightness
from mmaccel.attachment import attached
from mmaccel.methods import get_method
from mmaccel.pocket.pictures import pictures
from robotics import VLAPruner
from robotics import pocket as pocket_vla
from tests.diffusion.autoregressive.tiny import near, tiny
from tests.diffusion.tiny import call
from tests.diffusion.tiny import pipeline as tiny_pipeline
from vision_tokens.loading import load, open_picture

PICTURE = pictures("pocket-llava")[0]
BUDGETED = [name for name in methods_of("prefill") if "budget" in get_method(name).json_schema()["properties"]]
WHOLE = ("output-gate", "prefix-kv", "shortv", "vla-pruner")
"""Methods that drop no visual token of a first answer."""


@pytest.fixture(scope="module")
def shelf():
    return Shelf()


def asked(shelf, methods, stop=None, longest=8):
    seen = []
    picture = open_picture(PICTURE.file)
    stop = stop or threading.Event()
    ask_twice(*shelf.twin("pocket-llava", load), picture, PICTURE.questions[0][0], methods, longest, stop, seen.append)
    return seen


@pytest.mark.parametrize("name", BUDGETED)
def test_every_method_is_asked_and_its_tokens_are_drawn(shelf, name):
    *_, last = asked(shelf, [get_method(name).from_dict({"budget": 0.8})])
    assert last.answers[0] == PICTURE.questions[0][1]
    assert all(pair[1] is not None for pair in last.figures.values())
    kept = last.figures["visual tokens"][1]
    assert last.figures["visual tokens"][0] == 144 and 0 < kept <= 144
    assert (last.drawings[0].tobytes() == last.drawings[1].tobytes()) == (name in WHOLE)


def test_answers_grow_word_by_word_and_stop_when_told(shelf):
    stop = threading.Event()
    seen = []
    hired = get_method("hired").from_dict({"budget": 0.25})
    ask_twice(
        *shelf.twin("pocket-llava", load), open_picture(PICTURE.file), PICTURE.questions[0][0], [hired], 8, stop,
        lambda state: (seen.append(state), stop.set()),
    )  # fmt: skip
    assert seen[0].answers == ("", "") and seen[-1].answers[1] == ""
    assert [row[2] for row in seen[0].table()][-2:] == ["…", "…"]


def test_two_at_once_get_their_own_figures(shelf):
    found = {}

    def run(budget):
        found[budget] = asked(shelf, [get_method("hired").from_dict({"budget": budget})])[-1]

    threads = [threading.Thread(target=run, args=(budget,)) for budget in (0.125, 0.25, 0.5, 0.75)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {budget: one.figures["visual tokens"] for budget, one in found.items()} == {
        budget: (144, 144 * budget) for budget in (0.125, 0.25, 0.5, 0.75)
    }


def test_a_stopped_search_shows_the_best_so_far_and_counts_what_it_spent(shelf):
    from diffusion.loading import load as load_pipeline

    stop, seen = threading.Event(), []
    pipeline, _ = shelf.twin("pocket-flow", load_pipeline)
    stop.set()
    search = get_method("random-search").from_dict({"reward": {"reward": "brightness"}, "rounds": 50})
    arguments = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 16}
    search_live(pipeline, search, "a red circle", arguments, 0, stop, seen.append)
    assert seen[-1].stopped and seen[-1].best is not None and len(seen[-1].finalists) == 1
    assert int(dict(seen[-1].figures)["pictures scored"]) <= 2  # of the 2 noises of the first of 50 rounds


def test_a_search_of_a_video_pipeline_shows_frames():
    arguments = {name: value for name, value in call("wan-2.1").items() if name not in ("prompt", "generator")}
    seen = []
    search_live(
        tiny_pipeline("wan-2.1"), BestOfN(reward=Brightness(), n=2), "a", arguments, 0, threading.Event(), seen.append
    )
    sides = [picture.size for picture, _ in seen[-1].finalists]
    assert sides == [(192, 3 * 192)] * 2  # three frames, from top to bottom


def test_a_search_shows_what_it_scores_and_its_finalists(shelf):
    from diffusion.loading import load as load_pipeline

    seen = []
    pipeline, _ = shelf.twin("pocket-flow", load_pipeline)
    arguments = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 16}
    search_live(
        pipeline, BestOfN(reward=Brightness(), n=3), "a red circle", arguments, 0, threading.Event(), seen.append
    )
    assert seen[0].candidates is not None and not seen[-1].stopped
    assert len(seen[-1].finalists) == 3
    assert dict(seen[-1].figures) | {"decodes": ""} == {
        "best reward": seen[-1].finalists[0][1].split()[1].rstrip(","),
        "denoiser rows (NFE)": "6",
        "decodes": "",
        "pictures scored": "3",
    }


def test_a_stopped_look_says_so_and_a_whole_one_finds_the_moment():
    film, seen = example_file("film.mp4"), []
    find_live(film, "tstar", "colour-shape", ["blue square"], [], 2, 0.5, threading.Event(), seen.append)
    assert all(40 < time < 53 for time in seen[-1].times) and len(seen[-1].sheet) == 2
    stop = threading.Event()
    stop.set()
    find_live(film, "tstar", "colour-shape", ["blue square"], [], 2, 0.5, stop, seen.append)
    assert seen[-1].figures[-1] == ("stopped", "before the end") and not seen[-1].sheet


def test_an_episode_is_told_step_by_step_and_the_policy_comes_back():
    policy, seen, stop = pocket_vla.load(), [], threading.Event()
    act_live(policy, [VLAPruner(kept_share=0.25)], 0, stop, seen.append)
    last = dict(seen[-1].figures)
    assert last["steps"] == str(len(seen)) and last["ended"] == "success" and attached(policy.model) is None
    assert 25 < int(last["patches that the last layer works on"].split()[0]) < 100
    stop.set()
    act_live(policy, [], 0, stop, seen.append)
    last = dict(seen[-1].figures)
    assert last["ended"] == "stopped" and last["steps"] == "1"
    assert last["patches that the last layer works on"] == "100 %"


def test_a_painting_shows_where_every_token_comes_from(tmp_path):
    large = tiny(grid=4, channels=3)
    large.save_pretrained(tmp_path / "mar")
    with pytest.raises(FileNotFoundError, match="no folder `draft` with a small MARModel, which speculation needs"):
        paint_twice(load_painter(tmp_path / "mar"), 3, 4, 1.0, 0, threading.Event(), print)
    near(large).save_pretrained(tmp_path / "mar" / "draft")
    painter = load_painter(tmp_path / "mar")
    seen = []
    paint_twice(twin(painter), 3, 4, 1.0, 0, threading.Event(), seen.append)
    last = seen[-1]
    assert last.plain.size == last.speculative.size == last.origins.size
    rows = {name: (plain, drafted) for name, plain, drafted in last.figures}
    assert rows["passes of the large model"][0] == "16" and int(rows["passes of the large model"][1]) < 16
    with pytest.raises(ValueError, match=r"draws the classes 0 to 9; got '10'$"):
        paint_twice(twin(painter), 10, 4, 1.0, 0, threading.Event(), seen.append)
    stop = threading.Event()
    stop.set()
    paint_twice(twin(painter), 3, 4, 1.0, 0, stop, seen.append)
    assert seen[-1].progress == "stopped before the end" and seen[-1].plain is None


def test_the_model_draws_the_same_picture_with_and_without_the_page(tmp_path):
    large = tiny(grid=4, channels=3)
    near(large).save_pretrained(tmp_path / "mar" / "draft")
    large.save_pretrained(tmp_path / "mar")
    painter, seen = load_painter(tmp_path / "mar"), []
    paint_twice(painter, 3, 4, 1.0, 5, threading.Event(), seen.append)
    from demos.painting import as_picture

    (plain,) = {state.plain.tobytes() for state in seen if state.plain}
    assert plain == as_picture(painter.shown(painter.draw([3], 5))).tobytes()
