"""The shipped checkpoints are ordinary ones, small, and answer questions about scenes that no training saw."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from mmaccel import pocket
from mmaccel.pocket import world
from mmaccel.pocket.train import figures

NAMES = ("pocket-clip", "pocket-llava", "pocket-llava-next")
CLASSES = ("CLIPModel", "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")


def load(name):
    kind = AutoModel if name == "pocket-clip" else AutoModelForImageTextToText
    return kind.from_pretrained(pocket.path(name)).eval(), AutoProcessor.from_pretrained(pocket.path(name))


@pytest.fixture(scope="module")
def clip():
    return load("pocket-clip")


@pytest.fixture(scope="module")
def llava():
    return load("pocket-llava")


def test_all_models_are_listed():
    assert set(NAMES) <= set(pocket.names())


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(ValueError, match=r"no pocket model 'pocket-lava'; there are .*Did you mean 'pocket-llava'\?"):
        pocket.path("pocket-lava")


def test_asking_for_a_path_imports_no_framework():
    code = "import sys; from mmaccel import pocket; pocket.names(); print({'torch', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


@pytest.mark.parametrize(("name", "class_name"), list(zip(NAMES, CLASSES, strict=True)))
def test_weights_are_small_halves_of_the_librarys_own_class_and_load_as_floats(name, class_name):
    file = pocket.path(name) / "model.safetensors"
    assert file.stat().st_size < 4e6
    with safe_open(file, "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118 (no mapping)
    model, _ = load(name)
    assert type(model).__module__.startswith("transformers.") and type(model).__name__ == class_name
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_a_processor_survives_saving(name, tmp_path):
    processor = AutoProcessor.from_pretrained(pocket.path(name))
    processor.save_pretrained(tmp_path)
    image, question = next(world.held_out(1, 150))
    text = "a red circle" if name == "pocket-clip" else figures.prompts(processor, [(image, question)])[0]
    first, second = (
        kind(images=[image], text=[text], return_tensors="pt")
        for kind in (processor, AutoProcessor.from_pretrained(tmp_path))
    )
    assert set(first) == set(second)
    assert all(torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])) for key in first)


def test_the_towers_are_one():
    towers = [AutoModel.from_pretrained(pocket.path("pocket-clip")).vision_model.state_dict()]
    towers += [load(name)[0].model.vision_tower.state_dict() for name in NAMES[1:]]
    for other in towers[1:]:
        assert all(torch.equal(value, other[key]) for key, value in towers[0].items())


def test_llava_answers_held_out_questions(llava):
    items = list(world.held_out(200))
    shares = figures.per_kind(items, figures.answers(*llava, items))
    assert min(shares.values()) >= 0.88, shares
    assert shares["all"] >= 0.94, shares


def test_llava_next_answers_held_out_questions_on_pictures_of_any_shape():
    model, processor = load("pocket-llava-next")
    shares = []
    for pixels in ((192, 192), (96, 192), (192, 96), (180, 130)):
        items = list(world.held_out(24, pixels))
        shares.append(figures.per_kind(items, figures.answers(model, processor, items))["all"])
    assert np.mean(shares) >= 0.9, shares


def test_answers_from_all_tokens_are_those_of_generate(llava):
    items = list(world.held_out(40, seed=2))
    assert figures.answers_from(*llava, items, 1.0, "random") == figures.answers(*llava, items)


def test_cls_attention_tells_which_tokens_to_keep(llava):
    items = list(world.held_out(60))
    share = {
        (rank, fraction): figures.per_kind(items, figures.answers_from(*llava, items, fraction, rank))["all"]
        for rank, fraction in (("cls", 0.2), ("random", 0.2), ("cls", 0.05), ("random", 0.05))
    }
    dense = figures.per_kind(items, figures.answers(*llava, items))["all"]
    assert share["cls", 0.2] >= 0.95 * dense, share
    assert share["cls", 0.2] > share["random", 0.2] + 0.05, share
    assert share["cls", 0.05] > share["random", 0.05] + 0.05, share


def test_cls_attention_covers_the_things(clip):
    covered = figures.coverage(clip[0], 100)
    assert covered["kept 28"] >= 0.97
    assert covered["kept 14"] > covered["random 14"] + 0.4
    assert covered["kept 7"] > covered["random 7"] + 0.4


def test_a_true_caption_matches_better_than_a_false_one(clip):
    """But for relations, which it cannot tell: see the figures in its training script."""
    large, small = figures.matching(*clip, count=40), figures.matching(*clip, count=40, pixels=32)
    for kind in ("thing", "binding", "count", "relatum"):
        assert large[kind] >= 0.8, large
        assert small[kind] >= 0.9, small
