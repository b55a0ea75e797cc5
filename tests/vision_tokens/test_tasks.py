"""The batch task `answer` says what `mmaccel answer` says."""

from __future__ import annotations

import json

import pytest

from mmaccel.pocket.pictures import pictures
from tests.checkpoints import save_llava
from tests.video.films import film, steady
from video import KeyframeSearch
from vision_tokens import HiRED
from vision_tokens.answering import ask, ask_all, prepare, prepare_all
from vision_tokens.loading import open_picture
from vision_tokens.tasks import Answer

FILES = [picture.file for picture in pictures("pocket-llava")]
ASKED = ["what colour is the cross?", "how many are there?"]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return Answer.load(save_llava(tmp_path_factory.mktemp("checkpoints") / "llava"), "cpu")


def ran(host, methods, tmp_path, *jobs):
    stems = [tmp_path / str(place) for place in range(len(jobs))]
    reports = Answer.run(host, methods, jobs, [0] * len(jobs), stems)
    return [json.loads((tmp_path / f"{place}.json").read_text())["answer"] for place in range(len(jobs))], reports


@pytest.mark.parametrize("methods", [[], [HiRED(budget=0.3)]])
def test_a_batch_is_asked_in_one_call(host, tmp_path, methods):
    jobs = [Answer(image=str(file), question=text, longest=4) for file, text in zip(FILES, ASKED, strict=False)]
    said, reports = ran(host, methods, tmp_path, *jobs)
    model, processor = host
    inputs = prepare_all(processor, [open_picture(str(job.image)) for job in jobs], [job.question for job in jobs])
    assert inputs["attention_mask"][1, 0] == 0, "the shorter prompt is padded on the left"
    assert said == [answer.text for answer in ask_all(model, processor, inputs, methods, 4)]
    assert [report["spent"] for report in reports] == [{"prompts": 1}] * 2
    if methods:
        assert reports[0]["visual_tokens"] == 2 * 43 and "prefill_flops" not in reports[0]


def test_a_batch_of_one_is_the_command(host, tmp_path):
    (said,), _ = ran(host, [], tmp_path, Answer(image=str(FILES[0]), question=ASKED[0], longest=4))
    model, processor = host
    assert said == ask(model, processor, prepare(processor, open_picture(FILES[0]), ASKED[0]), [], 4).text


def test_a_video_is_answered_by_its_keyframes(host, tmp_path):
    path = film(tmp_path / "film.mp4", steady(60))
    job = Answer(video=str(path), question="where is the red triangle?", longest=2)
    method = KeyframeSearch("uniform", frames=2)
    _, (report,) = ran(host, [method, HiRED(budget=0.5)], tmp_path, job)
    assert len(report["keyframes"]["seconds"]) == 2 and report["methods"][0]["method"] == "hired"
