"""Dynamic-LLaVA reproduces the released predictors' logits and choices, and reads their weights or says why not."""

import pytest
import torch
from safetensors.torch import save_file

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.deep import build_deep
from tests.vision_tokens.golden import FOLDER, load
from tests.vision_tokens.tiny import Prompts, inputs_for
from tests.vision_tokens.usage import assert_only_safetensors_are_weights
from vision_tokens import DynamicLLaVA, FastV
from vision_tokens.decoder_layers import keep_highest
from vision_tokens.laws import generated
from vision_tokens.predictors import ImagePredictor, OutputPredictor

GOLDEN = "dynamic_llava/predictors"
WEIGHTS = str(FOLDER / f"{GOLDEN}.safetensors")


def prompt_of():
    return inputs_for("llava", Prompts((((96, 70),),), (7,)), build_deep("llava"))


def test_the_image_predictor_s_logits_and_choice_are_the_released_code_s():
    tensors, _ = load(GOLDEN)
    with torch.no_grad():
        logits = ImagePredictor.load(WEIGHTS, 32)(tensors["image_states"])
    torch.testing.assert_close(logits, tensors["image_logits"], rtol=1e-5, atol=1e-6)
    (kept,) = DynamicLLaVA.preset("llava-1.5-20").kept(32, 60)
    keep = keep_highest(logits.log_softmax(-1)[..., 0], torch.ones(2, 60, dtype=torch.bool), [kept] * 2)
    assert torch.equal(keep.nonzero()[:, 1].view(2, -1), tensors["keep_indices"])


def test_115_of_576_tokens_stay_as_in_the_paper():
    assert DynamicLLaVA.preset("llava-1.5-20").kept(32, 576) == (115,)


def test_the_output_predictor_s_logits_are_the_released_code_s():
    tensors, _ = load(GOLDEN)
    with torch.no_grad():
        logits = OutputPredictor.load(WEIGHTS, 32)(tensors["output_states"])
    torch.testing.assert_close(logits, tensors["output_logits"], rtol=1e-5, atol=1e-6)


def test_the_model_keeps_what_the_predictor_says_of_its_hidden_states():
    model, inputs = build_deep("llava"), prompt_of()
    method = DynamicLLaVA(weights=WEIGHTS, kept_share=0.25)
    visual = inputs["input_ids"][0] == 99
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states[2][:, visual]
        worth = ImagePredictor.load(WEIGHTS, 32)(states).log_softmax(-1)[0, :, 0]
    places = visual.nonzero().flatten()[worth.topk(9).indices.sort().values]
    with mmaccel.applied(model, method) as run:
        generated(model, inputs, 1)
        held = run.report.details["layer_columns"]
    assert sorted(held) == [2, 3, 4, 5]
    assert torch.equal(held[2].index[0][visual[held[2].index[0]]], places)


def test_padding_changes_nothing_that_an_image_predictor_says():
    tensors, _ = load(GOLDEN)
    predictor, states = ImagePredictor.load(WEIGHTS, 32), tensors["image_states"]
    real = torch.arange(60)[None] >= torch.tensor([[0], [23]])
    with torch.no_grad():
        together, alone = predictor(states, real), predictor(states[1:, 23:])
    torch.testing.assert_close(together[1:, 23:], alone, rtol=1e-5, atol=1e-6)


def test_without_weights_tokens_are_ranked_as_fastv_ranks_them():
    model, inputs = build_deep("llava"), prompt_of()
    found = []
    for method in (DynamicLLaVA(kept_share=0.25), FastV(layer=2, kept_share=0.25)):
        with mmaccel.applied(model, method):
            found.append(generated(model, inputs, 4)[1])
    assert torch.equal(*found)


def test_weights_that_cannot_be_used_are_refused(tmp_path):
    model, file = build_deep("llava"), tmp_path / "w.safetensors"
    assert_only_safetensors_are_weights(model, lambda file: DynamicLLaVA(weights=file), tmp_path)
    save_file({"lm_head.weight": torch.ones(2)}, file)
    with pytest.raises(Unsupported, match=r"holds no image_score_predictor.down_mlp.1.weight, so no predictor"):
        mmaccel.apply(model, DynamicLLaVA(weights=str(file)))
    save_file({f"image_score_predictor.{k}": v for k, v in ImagePredictor(48, 16).state_dict().items()}, file)
    with pytest.raises(Unsupported, match=r"reads hidden states of width 48, and this model's are 32 wide; it belongs"):
        mmaccel.apply(model, DynamicLLaVA(weights=str(file)))
    whole = {f"image_score_predictor.{k}": v for k, v in ImagePredictor(32, 16).state_dict().items()}
    save_file({name: value for name, value in whole.items() if not name.endswith("qkv.weight")}, file)
    with pytest.raises(Unsupported, match=r"holds no whole image_score_predictor: .*Missing key"):
        mmaccel.apply(model, DynamicLLaVA(weights=str(file)))


def test_hidden_states_that_hold_nan_are_refused():
    model, inputs = build_deep("llava"), prompt_of()
    inputs["pixel_values"] = inputs["pixel_values"] * torch.nan
    with (
        mmaccel.applied(model, DynamicLLaVA(weights=WEIGHTS)),
        pytest.raises(ValueError, match="hidden states hold NaN, so dynamic-llava cannot rank tokens"),
    ):
        generated(model, inputs, 1)
