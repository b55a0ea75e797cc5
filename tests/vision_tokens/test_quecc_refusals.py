"""QueCC says what it cannot do: models of another kind, weights that do not fit, prompts that ask nothing."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.tiny import IMAGE, build
from tests.vision_tokens.tiny.weights import quecc_weights, save_compressor
from tests.vision_tokens.usage import assert_only_safetensors_are_weights, own, prompt_of
from vision_tokens import QueCC, VisionZip
from vision_tokens.laws import fingerprint, generated
from vision_tokens.loading import load
from vision_tokens.query_compressor import QueryCompressor

METHOD = QueCC(weights=quecc_weights())


@pytest.mark.parametrize("family", ["llava_next", "paligemma", "llava_onevision", "qwen2_5_vl", "fast_vlm", "gemma3"])
def test_models_without_one_square_grid_are_refused(family):
    model = build(family)
    before = fingerprint(model)
    with pytest.raises(Unsupported, match=r"on one square grid a picture, as LLaVA 1.5 reads it; this \w+ reads"):
        mmaccel.apply(model, METHOD)
    assert fingerprint(model) == before


def test_several_hidden_states_for_the_projector_are_refused():
    model = own()
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(Unsupported, match="this llava reads tiles, videos, several states or the encoder's output"):
        mmaccel.apply(model, METHOD)


def test_what_ships_is_for_the_embedded_model_alone(llava):
    with pytest.raises(
        Unsupported,
        match=r"in 'pocket-llava' is for another model: it reads features of width 128 and a language model's of 128; "
        "this model's are 32 and 32 wide",
    ):
        mmaccel.apply(llava, QueCC())


@pytest.mark.parametrize(
    ("sizes", "notes", "method", "message"),
    [
        ((32, 64, 48, 3), {}, {}, r"features of width 32 and a language model's of 48; this model's are 32 and 32"),
        ((32, 64, 32, 3), {}, {}, r"it reads 2 hidden states of the encoder, and levels= names 4: 12, 16, 22, 23"),
        ((32, 64, 32, 3), {"levels": "1 9"}, {}, r"reads the encoder's hidden states 1, 9, and this one has 0 to 3"),
        ((32, 64, 32, 4), {}, {"levels": (1, 2)}, r"squares of 4 x 4 cells, which do not tile .* grid of 6 x 6"),
        ((32, 64, 32, 2), {}, {"levels": (1, 2), "budget": 0.2},
         r"makes 9 tokens of a picture's 36, and the budget 0.2 has room for 7; say budget=9"),
        ((30, 60, 32, 3), {}, {}, r"holds a QueCC compressor 30 wide, which its 8 heads cannot share equally"),
    ],
)  # fmt: skip
def test_weights_for_another_model_are_refused(llava, tmp_path, monkeypatch, sizes, notes, method, message):
    monkeypatch.setattr("vision_tokens.query_compressor.HEADS", 1 if sizes[0] == 30 else 8)
    compressor = QueryCompressor(*sizes)
    monkeypatch.undo()
    file = save_compressor(compressor, tmp_path / "w.safetensors", **notes)
    with pytest.raises(Unsupported, match=message):
        mmaccel.apply(llava, QueCC(weights=file, **method))


def test_files_that_hold_no_whole_compressor_are_refused(llava, tmp_path):
    assert_only_safetensors_are_weights(llava, lambda file: QueCC(weights=file), tmp_path)
    file = tmp_path / "w.safetensors"
    save_file({"lm_head.weight": torch.ones(2)}, file)
    with pytest.raises(Unsupported, match=r"holds no QueCC compressor: it lacks mm_projector.0.q_proj.0.weight"):
        mmaccel.apply(llava, QueCC(weights=str(file)))
    compressor = QueryCompressor(32, 64, 32, 3)
    compressor.v_proj[0].bias.data[3] = torch.nan
    save_compressor(compressor, file)
    with pytest.raises(Unsupported, match=r"holds NaN or infinite numbers in v_proj.0.bias of its QueCC compressor"):
        mmaccel.apply(llava, QueCC(weights=str(file)))


@pytest.mark.parametrize("name", ["levels", "template"])
@pytest.mark.parametrize("numbers", [(), (-1, 2)])
def test_numbers_below_zero_are_refused(name, numbers):
    with pytest.raises(ValueError, match=f"quecc's {name} names whole numbers from 0 up; got"):
        QueCC(**{name: numbers})


def test_a_prompt_that_asks_nothing_is_refused(llava):
    inputs = prompt_of(text=(3,))
    with (
        mmaccel.applied(llava, METHOD),
        pytest.raises(ValueError, match=r"row 0 of the prompt has 2 tokens behind its last picture, of which 1 \+ 1"),
    ):
        generated(llava, inputs, 1)
    assert int((inputs["input_ids"] == IMAGE).sum()) == 36


def test_pictures_that_hold_nan_are_refused(llava):
    inputs = prompt_of()
    inputs["pixel_values"] = inputs["pixel_values"] * torch.nan
    with (
        mmaccel.applied(llava, METHOD),
        pytest.raises(ValueError, match="made for the question hold NaN; look for NaN in pixel_values"),
    ):
        generated(llava, inputs, 1)


def test_features_of_another_method_are_refused(llava):
    inputs = prompt_of()
    with mmaccel.applied(llava, VisionZip(budget=0.3)):
        encoded = llava.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with mmaccel.applied(llava, METHOD), pytest.raises(Unsupported, match="were computed without the method"):
        llava(**inputs, mm_encoder_outputs={"image": encoded})


def test_a_budget_below_what_ships_is_refused():
    model, _ = load("pocket-llava")
    with pytest.raises(
        Unsupported, match=r"makes 9 tokens of a picture's 144, and the budget 0.05 has room for 7; say"
    ):
        mmaccel.apply(model, QueCC(budget=0.05))


def test_everything_needs_no_weights(llava):
    inputs = prompt_of()
    _, dense = generated(llava, inputs, 2)
    with mmaccel.applied(llava, replace(METHOD, weights="nowhere", budget=1.0)):
        assert torch.equal(generated(llava, inputs, 2)[1], dense)
