"""A decorated processor: a video goes in, its keyframes come out as pictures, and it can all be taken back."""

from __future__ import annotations

import copy
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import mmaccel
from mmaccel import pocket
from video import AKS, ColourShape, DenseRetrieval, Film, KeyframeSearch, TStar, Uniform, WholeQuestion, answer
from video.grounding import AskModel, Words, _loaded, read_answer
from vision_tokens import AIM, HiRED, PrefixKV

FOLDER = pocket.path("pocket-llava")
PROMPT = "USER: <video>\nwhere is the {name}? ASSISTANT:"


@pytest.fixture
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()


def chat(file, question):
    return [{"role": "user", "content": [{"type": "video", "path": str(file)}, {"type": "text", "text": question}]}]


def as_tensors(processor, conversation):
    return processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def test_a_call_with_a_video_is_the_call_with_its_keyframes(haystack, processor):
    event = haystack.events[1]
    text = PROMPT.format(name=event.target.name)
    method = KeyframeSearch(TStar(), frames=3, stamp="")
    with Film(haystack.path) as film:
        found, targets, _ = method.find(film, text)
    assert targets == (event.target.name,)
    pictures = [Image.fromarray(picture) for picture in found.frames.pictures]
    expected = processor(text=text.replace("<video>", "<image>" * 3), images=pictures, return_tensors="pt")
    mmaccel.apply(processor, method)
    got = processor(text=text, videos=haystack.path, return_tensors="pt")
    assert set(got) == set(expected) and all(torch.equal(got[key], expected[key]) for key in expected)
    (told,) = mmaccel.report(processor).facts["keyframes"]
    assert told["seconds"] == found.times.tolist() and told["verified"] == found.verified and not told["notes"]
    assert mmaccel.report(processor)["frames_looked_at"] == found.ledger.spent["frames"]


def test_a_chat_with_a_video_is_the_chat_with_stamped_pictures(haystack, processor):
    question = f"where is the {haystack.events[0].target.name}?"
    method = KeyframeSearch(frames=2, stamp="at {seconds:.0f}: ")
    with Film(haystack.path) as film:
        found, _, _ = method.find(film, question)
    content = []
    for time, picture in zip(found.times, found.frames.pictures, strict=True):
        content += [{"type": "text", "text": f"at {time:.0f}: "}, {"type": "image", "image": Image.fromarray(picture)}]
    plain = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    expected = as_tensors(processor, plain)
    with mmaccel.applied(processor, method) as run:
        conversation = chat(haystack.path, question)
        before = copy.deepcopy(conversation)
        got = as_tensors(processor, conversation)
        assert conversation == before, "the user's own chat is left as it was"
        assert all(torch.equal(got[key], expected[key]) for key in expected)
        assert run.report.facts["keyframes"][0]["seconds"] == found.times.tolist()
        both = processor.apply_chat_template([conversation, conversation])
        assert both == [processor.apply_chat_template(plain)] * 2


def test_what_names_no_video_is_the_plain_call(haystack, processor):
    picture = Image.new("RGB", (96, 96))
    plain = processor(text="USER: <image>\nwhat? ASSISTANT:", images=picture, return_tensors="pt")
    words = processor.apply_chat_template([{"role": "user", "content": "hello"}])
    mmaccel.apply(processor, KeyframeSearch())
    got = processor(text="USER: <image>\nwhat? ASSISTANT:", images=picture, return_tensors="pt")
    assert all(torch.equal(got[key], plain[key]) for key in plain)
    assert processor.apply_chat_template([{"role": "user", "content": "hello"}]) == words
    with pytest.raises(ValueError, match="nothing to report yet"):
        mmaccel.report(processor)


def test_several_texts_have_a_video_each(haystack, processor):
    mmaccel.apply(processor, KeyframeSearch(frames=2, stamp=""))
    texts = [PROMPT.format(name=event.target.name) for event in haystack.events[:2]]
    got = processor(text=texts, videos=[haystack.path, str(haystack.path)], return_tensors="pt", padding=True)
    assert got["pixel_values"].shape[0] == 4 and got["input_ids"].shape[0] == 2
    assert len(mmaccel.report(processor).facts["keyframes"]) == 2


def test_removing_restores_the_processor(haystack, processor, tmp_path):
    facts, kind, listed = dict(vars(processor)), type(processor), processor.to_dict()
    mmaccel.apply(processor, KeyframeSearch())
    assert type(processor) is not kind and isinstance(processor, kind) and type(processor).__name__ == kind.__name__
    assert processor.to_dict() == listed
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).to_dict() == listed
    assert type(copy.deepcopy(processor)) is kind
    mmaccel.remove(processor)
    assert type(processor) is kind and vars(processor) == facts


def test_the_film_asked_about_last_stays_open(haystack, processor):
    mmaccel.apply(processor, KeyframeSearch(frames=2))
    looked = []
    for _ in range(2):
        processor.apply_chat_template(chat(haystack.path, haystack.events[0].question))
        looked.append(mmaccel.report(processor)["frames_looked_at"])
    assert looked[0] > 0 and looked[1] == 0


def test_threads_share_a_decorated_processor(haystack, processor):
    mmaccel.apply(processor, KeyframeSearch(frames=2))
    found = {}

    def ask(event):
        processor.apply_chat_template(chat(haystack.path, event.question))
        found[event.target.name] = mmaccel.report(processor).facts["keyframes"][0]["targets"]

    threads = [threading.Thread(target=ask, args=(event,)) for event in haystack.events]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {event.target.name: [event.target.name] for event in haystack.events}


def test_a_question_that_names_nothing_gets_even_frames_and_says_so(haystack, processor):
    mmaccel.apply(processor, KeyframeSearch(frames=4))
    processor.apply_chat_template(chat(haystack.path, "what happens?"))
    (told,) = mmaccel.report(processor).facts["keyframes"]
    assert told["seconds"] == [15.0, 45.0, 75.0, 105.0] and told["scores"] == [None] * 4
    assert told["notes"] == ["nothing to look for: the frames are evenly spaced"]
    assert json.loads(json.dumps(mmaccel.report(processor).to_dict()))["frames_looked_at"] == 0


def test_the_answer_lies_in_the_frames_that_the_search_finds(haystack, model, processor):
    """Keyframes, then a visual-token method, then the model, which was trained on single pictures."""
    right = {"tstar": 0, "uniform": 0}
    with Film(haystack.path) as film:
        for event in haystack.events:
            for search in (TStar(), Uniform()):
                method = KeyframeSearch(search, frames=4)
                said = answer(model, processor, film, event.question, method, longest=8, alone=True)
                right[search.name] += said.text == event.answer
    assert right["tstar"] == 4 > right["uniform"]
    event = haystack.events[0]
    with mmaccel.applied(model, HiRED(budget=0.5)) as run:
        said = mmaccel.answer(model, processor, haystack.path, event.question, alone=True, longest=8)
        assert said.text == event.answer and run.report["visual_tokens"] == 72
        half = run.report["kv_bytes"]
    with mmaccel.applied(model, AIM(budget=0.6), PrefixKV(budget=0.5)) as run:
        said = mmaccel.answer(model, processor, haystack.path, event.question, alone=True, longest=8)
        assert said.text == event.answer and run.report["kv_bytes"] < half
    mmaccel.apply(processor, KeyframeSearch(Uniform(), frames=2))
    together = mmaccel.answer(model, processor, haystack.path, event.question, longest=3)
    assert together.keyframes.times.tolist() == [30.0, 90.0]


def test_questions_about_other_files_are_refused_by_their_kind(tmp_path, model, processor):
    with pytest.raises(FileNotFoundError, match=r"there is no file 'none.mp4' to ask about"):
        mmaccel.answer(model, processor, "none.mp4", "what?")
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(
        ValueError, match=r"is of the kind 'text', by its ending, and questions are answered about: video"
    ):
        mmaccel.answer(model, processor, tmp_path / "notes.txt", "what?")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text": "USER: what? ASSISTANT:"}, r"a text says once, as <video>, where its video belongs; got 'USER"),
        ({"text": ["<video> a", "<video> b"]}, r"every text has one video; got 2 texts and 1 videos"),
        ({"text": "<video>", "images": Image.new("RGB", (9, 9))}, r"pictures beside a video are not supported"),
        ({"text": "<video>", "videos": "none.mp4"}, r"there is no video 'none.mp4'"),
    ],
)
def test_calls_that_make_no_sense_are_refused(haystack, processor, call, message):
    mmaccel.apply(processor, KeyframeSearch())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        processor(**{"videos": haystack.path, **call})


def test_a_model_is_no_processor(model):
    with pytest.raises(mmaccel.Unsupported, match=r"a model never sees the file\); got LlavaForConditionalGeneration"):
        mmaccel.apply(model, KeyframeSearch())


@pytest.mark.parametrize(
    "method",
    [
        KeyframeSearch(),
        KeyframeSearch(AKS(depth=3), frames=16, budget=100, targets=["cat"], cues=["bowl"], short=224),
        KeyframeSearch(DenseRetrieval(), detector=ColourShape(smallest=9), grounding=WholeQuestion(), stamp=""),
    ],
)
def test_a_keyframe_search_survives_its_dictionary(method):
    data = json.loads(json.dumps(method.to_dict()))
    assert KeyframeSearch.from_dict(data) == method and data["search"]["search"] == method.search.name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "red circle"}, r"targets is a list of phrases; for one phrase write targets=\['red circle'\]"),
        ({"frames": 0}, r"at least one frame is to be chosen; got frames=0"),
        ({"budget": 0.0}, r"a share of the video's seconds in \(0, 1\]"),
        ({"stamp": "{minutes}"}, r"a stamp may hold \{seconds\}.*got '\{minutes\}'"),
        ({"search": TStar}, r"a search is an object, and TStar is a class; build one, with its settings: TStar\(\)"),
        ({"search": min}, r"a search is a FrameSearch, a name, a dictionary .* or a reference .*; got <built-in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KeyframeSearch(**settings)


@pytest.mark.parametrize(
    ("question", "targets"),
    [
        ("where is the red triangle?", ("red triangle",)),
        ("Is the cross left of the blue thing?", ("cross", "blue thing")),
        ("how many crosses and red circles?", ("cross", "red circle")),
        ("what happens?", ()),
    ],
)
def test_words_name_the_coloured_shapes_of_a_question(question, targets):
    assert Words()(question, None) == (targets, ())


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("Key objects: Cup, dog's bowl\nCue objects: 1. kitchen-sink.", (("cup", "dogs bowl"), ("kitchen-sink",))),
        ("1) key objects: cup\n\n2) cue objects:\n", (("cup",), ())),
        ("I do not know.", ((), ())),
        ("", ((), ())),
    ],
)  # fmt: skip
def test_a_models_two_lines_are_read(said, read):
    assert read_answer(said) == read


def test_a_vision_language_model_is_asked_what_to_look_for(haystack, model, processor, monkeypatch):
    asked = []

    def says(**inputs):
        asked.append(inputs)
        line = processor.tokenizer("red circle , blue square", add_special_tokens=False, return_tensors="pt").input_ids
        return torch.cat([inputs["input_ids"], line], dim=1)

    _loaded.cache_clear()
    held, _ = _loaded("pocket-llava")
    monkeypatch.setattr(held, "generate", says)
    with Film(haystack.path) as film:
        assert AskModel(model="pocket-llava", frames=3)("where?", film) == ((), ()), "one line is not two"
        monkeypatch.setattr("video.grounding.read_answer", lambda text: ((text,), ()))
        assert AskModel(model="pocket-llava", frames=3)("where?", film) == (("red circle , blue square",), ())
    assert asked[0]["pixel_values"].shape[0] == 3
    assert np.isfinite(asked[0]["pixel_values"].numpy()).all()
