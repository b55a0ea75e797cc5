"""Generated inputs against the public entry points: a result, or an error that the docstrings name, and nothing else.

MMACCEL_FUZZ=1300 pytest tests/core/test_fuzzing.py makes that many of each of the eight kinds.
"""

import io
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import mmaccel
from mmaccel.batch.jobs import Job, JobFile
from mmaccel.budgets import Tokens, check_budget, kept_count
from mmaccel.methods import get_method, list_methods
from mmaccel.pocket.pictures import pictures
from tests.checkpoints import save_llava
from tests.diffusion.tiny import call, pipeline
from vision_tokens.answering import ask, prepare
from vision_tokens.loading import load, open_picture

EACH = int(os.environ.get("MMACCEL_FUZZ", "40"))
QUICK = settings(max_examples=EACH, deadline=None, suppress_health_check=list(HealthCheck))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=12),
    st.sampled_from([0, 1, 2, 0.2, 1.0, "kept", "packed", "clip-score", "adaptive", "../x", "os:system"]),
)  # fmt: skip
DATA = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
NAMES = st.sampled_from([*list_methods(), "", "hird", "clip-score"])
FIELDS = sorted({key for name in list_methods() for key in get_method(name).json_schema()["properties"]})


@st.composite
def settings_of_a_method(draw):
    """Mostly a method's own settings with values of any kind, among them what nobody should write."""
    keys = st.sampled_from([*FIELDS, "version", "preset", "budgte"])
    return {"method": draw(NAMES), **draw(st.dictionaries(keys, DATA, max_size=4))}


@QUICK
@given(DATA | settings_of_a_method() | st.lists(settings_of_a_method(), max_size=3))
def test_recipes(data):
    try:
        methods = mmaccel.recipe_from_data(data)
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    for method in methods:
        assert method.described()["method"] == method.name


@QUICK
@given(SCALARS | st.builds(lambda count: count, st.integers(1, 10**6)), st.integers(1, 10**6))
def test_budgets(budget, total):
    try:
        check_budget(budget)
        kept = kept_count(budget, total)
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    assert 1 <= kept <= total
    assert isinstance(budget, float) or kept == (budget.count if isinstance(budget, Tokens) else budget)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(save_llava(tmp_path_factory.mktemp("model") / "llava"))


STAGES = {"vision", "prefill", "decoder", "kv_cache"}
ASKABLE = [name for name in list_methods() if set(get_method(name).stages) <= STAGES]
BUDGETS = st.sampled_from([0.01, 0.2, 0.5, 0.999, 1.0, 2, 144, 145, 10**9]) | st.floats(0, 1) | st.integers(-2, 200)


@QUICK
@example(text="", name="tome", budget=144)  # as many as there are: once an index too far
@given(text=st.text(max_size=40), name=st.sampled_from(ASKABLE), budget=BUDGETS)
def test_prompts_and_budgets_of_a_call(model, text, name, budget):
    before = [hook for module in model[0].modules() for hook in module._forward_pre_hooks]
    try:
        method = get_method(name).from_dict({"budget": budget})
        picture = open_picture(pictures("pocket-llava")[0].file)
        found = ask(*model, prepare(model[1], picture, text), [method], longest=2)
        assert 0 <= found.report["visual_tokens"] <= 144
    except (ValueError, TypeError) as error:
        assert str(error)
    assert [hook for module in model[0].modules() for hook in module._forward_pre_hooks] == before


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """A file cut short, with bytes changed, or not that file at all."""

    def change(edits: list[tuple[int, int]]) -> bytes:
        found = bytearray(whole)
        for place, value in edits:
            found[place % len(whole)] = value
        return bytes(found)

    edits = st.lists(st.tuples(st.integers(0, len(whole)), st.integers(0, 255)), max_size=20)
    return st.one_of(
        st.binary(max_size=200), st.integers(0, len(whole)).map(lambda cut: whole[:cut]), edits.map(change)
    )


def encoded(kind: str) -> bytes:
    """A small picture as a file of this kind."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((9, 7)).convert("RGB").save(file, format=kind)
    return file.getvalue()


@QUICK
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]).flatmap(lambda kind: damaged(encoded(kind))))
def test_pictures(content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture"
        file.write_bytes(content)
        try:
            picture = open_picture(file)
        except ValueError as error:
            assert str(file) in str(error)
            return
        assert picture.mode == "RGB"


FILM = (Path(__file__).parents[2] / "demos" / "examples" / "film.mp4").read_bytes()


@QUICK
@given(damaged(FILM), st.lists(st.floats(-1, 70), max_size=3))
def test_videos(content, times):
    from video import open_video

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "film.mp4"
        file.write_bytes(content)
        try:
            with open_video(file) as reader:
                frames = reader.frames_at(times, short=16)
        except ValueError as error:
            assert str(error)
            return
        assert len(frames.pictures) == len(times)


ROWS = (
    {"task": "answer", "image": "a.png", "question": "what?"},
    {"task": "generate", "prompt": "a red circle", "recipe": [{"method": "best-of-n", "reward": "brightness"}]},
    {"task": "keyframes", "video": "a.png", "find": ["red circle"]},
    {"task": "ask"},
)


@st.composite
def job_rows(draw):
    """A row that is nearly right, or anything."""
    row = draw(st.sampled_from(ROWS))
    row = {**row, "output": draw(st.text(max_size=12) | st.just("a/b"))}
    keys = st.sampled_from(["task", "model", "recipe", "seed", "output", "image", "budget", "longest", "near"])
    changes = st.dictionaries(keys, settings_of_a_method() | DATA, max_size=2)
    return draw(st.just({**row, **draw(st.just({}) | changes)}) | DATA)


@QUICK
@given(st.lists(job_rows(), max_size=4), st.binary(max_size=30))
def test_job_rows(rows, rest):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jobs.jsonl"
        (Path(folder) / "a.png").write_bytes(encoded("PNG"))
        lines = [json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace") for row in rows]
        file.write_bytes(b"\n".join([*lines, rest]))
        try:
            for one in JobFile(file).jobs():
                assert isinstance(one, Job) or (one and all(str(problem) for problem in one))
        except ValueError as error:
            assert str(error)


SEARCHES = [name for name in list_methods() if "reward" in get_method(name).json_schema()["properties"]]
SIZES = st.sampled_from([-1, 0, 0.3, 1, 1.0, 2, 3, 5, "kept", None])


@st.composite
def searches(draw):
    """A search, with some of its settings small, wrong or both."""
    name = draw(st.sampled_from(SEARCHES))
    keys = st.sampled_from(sorted(set(get_method(name).json_schema()["properties"]) - {"reward"}))
    return {"method": name, "reward": "brightness", **draw(st.dictionaries(keys, SIZES, max_size=3))}


@QUICK
@given(text=st.text(max_size=20), search=searches(), steps=st.integers(1, 4))
def test_searches_of_a_pipeline(text, search, steps):
    pipe, arguments = pipeline("stable-diffusion"), call("stable-diffusion")
    before = pipe.__class__
    try:
        with mmaccel.applied(pipe, *mmaccel.recipe_from_data(search)) as run:
            found = pipe(**{**arguments, "prompt": text, "num_inference_steps": steps}).images
            assert run.report["denoiser_rows"] > 0 and found.isfinite().all()
    except (ValueError, TypeError) as error:
        assert str(error)
    assert pipe.__class__ is before and "step" not in vars(pipe.scheduler)


@QUICK
@given(st.floats() | st.integers(), st.integers(-3, 10**7), st.sampled_from(["reasoning", "ocr", "ask"]),
       st.lists(st.floats() | st.integers(1, 10**12), max_size=3))  # fmt: skip
def test_plans(flops, text_tokens, task, sizes):
    try:
        found = mmaccel.plan(flops, text_tokens, task, sizes)
    except ValueError as error:
        assert str(error)
        return
    assert found.visual_tokens >= 1 and found.flops <= flops * (1 + 1e-9)
