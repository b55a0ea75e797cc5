"""The shipped autoregressive models: small, of the classes they say, drawing what their labels name, and sped up."""

import pytest
from safetensors import safe_open

import mmaccel
from diffusion.autoregressive import MARModel
from diffusion.autoregressive.painters import load_painter
from diffusion.autoregressive.training import NAMES
from mmaccel import pocket
from mmaccel.pocket import world

SIZES = {"pocket-mar": 21e6, "pocket-imagegpt": 6e6}
CLASSES = {"pocket-mar": "MARModel", "pocket-imagegpt": "ImageGPTForCausalImageModeling"}
every_name = pytest.mark.parametrize("name", SIZES)


@every_name
def test_weights_are_small_halves_and_load_as_floats(name):
    assert pocket.size(name) < SIZES[name]
    for file in pocket.path(name).rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118
    painter = load_painter(name)
    assert type(painter.model).__name__ == CLASSES[name] and str(painter.model.dtype) == "torch.float32"
    assert isinstance(painter.model, MARModel) == (name == "pocket-mar")
    assert painter.classes == 24 and [painter.label(text) for text in NAMES.values()] == list(range(24))


def seen(pictures):
    """The things of each picture, by name."""
    pixels = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [[thing.name for thing in world.parse(picture).things] for picture in pixels]


@every_name
def test_a_picture_takes_fewer_calls_with_drafts(name):
    painter = load_painter(name)
    with mmaccel.applied(painter.model, painter.speculation) as run:
        drawn = painter.shown(painter.draw([0], 0))
    assert drawn.shape == (1, 3, 32, 32)
    calls = run.report.quantities["target_head_calls" if name == "pocket-mar" else "passes"]
    assert calls.value < {"pocket-mar": 0.2, "pocket-imagegpt": 0.4}[name] * calls.dense


@pytest.mark.slow
@every_name
def test_some_pictures_show_exactly_what_their_label_names(name):
    """By chance 2 of 48 would, if each showed one thing."""
    painter = load_painter(name)
    labels = [label for label in range(24) for _ in range(2)]
    found = seen(painter.shown(painter.draw(labels, 0, guidance=2.0 if name == "pocket-mar" else 1.0)))
    right = sum(things == [NAMES[label]] for label, things in zip(labels, found, strict=True))
    assert right > {"pocket-mar": 12, "pocket-imagegpt": 5}[name]
