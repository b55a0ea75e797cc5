"""FastV reproduces the released code's selections and logits, and spends its budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.deep import build_deep
from tests.vision_tokens.golden import llama, load, places, read_then_decode
from tests.vision_tokens.tiny import Prompts, inputs_for
from vision_tokens import FastV
from vision_tokens.decoder_layers import keep_highest
from vision_tokens.kept_columns import layer_columns
from vision_tokens.layer_cutting import per_layer

GOLDENS = ["tiny_llama_k2_r50", "tiny_llama_k3_r75_gqa"]


@pytest.mark.parametrize("name", GOLDENS)
def test_the_cut_and_the_logits_are_the_released_code_s(name):
    tensors, exact = load(f"fastv/{name}")
    start, length, layer = tensors["start_len_K"].tolist()
    model, visual = llama(tensors), places(tensors, start, length)
    layers = model.config.text_config.num_hidden_layers
    with mmaccel.applied(model, FastV(layer=layer, kept_share=1 - float(exact["fastv_r"]))):
        logits, cache = read_then_decode(model, tensors["inputs_embeds"], visual, tensors["decode_tokens"])
    held = layer_columns(cache)
    assert sorted(held) == list(range(layer, layers))
    assert all(torch.equal(columns.index[0], tensors["keep_indices"]) for columns in held.values())
    expected = torch.cat([tensors["logits_prefill_last"], tensors["decode_logits"]])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", GOLDENS)
def test_the_kept_tokens_are_the_highest_of_the_released_code_s_row(name):
    tensors, exact = load(f"fastv/{name}")
    start, length, layer = tensors["start_len_K"].tolist()
    row = tensors["last_row_attention_layer_Km1"].mean(dim=0)[None]
    visual = torch.zeros_like(row, dtype=torch.bool)
    visual[:, start : start + length] = True
    counts = FastV(layer=layer, kept_share=1 - float(exact["fastv_r"])).kept(32, length)
    keep = keep_highest(row, visual, counts) | ~visual
    assert torch.equal(keep[0].nonzero().flatten(), tensors["keep_indices"])


@given(st.integers(3, 48), st.integers(1, 600), st.floats(0.01, 1.0), st.data())
def test_the_mean_over_layers_is_the_budget_to_half_a_token(layers, visual, budget, data):
    layer = data.draw(st.integers(1, layers - 1))
    method = FastV(budget=budget, layer=layer)
    if budget < layer / layers:
        with pytest.raises(
            Unsupported, match=r"mean over layers is at least .* out of reach: raise it, or cut earlier"
        ):
            method.cuts(layers)
        return
    kept = dict(zip(method.cuts(layers), method.kept(layers, visual), strict=False))
    assert abs(sum(per_layer(visual, kept, layers)) / layers - budget * visual) <= 0.5


def test_a_budget_may_be_a_number_of_tokens():
    assert FastV(budget=288, layer=2).kept(32, 576) == FastV(budget=0.5, layer=2).kept(32, 576) == (269,)


@pytest.mark.parametrize("settings", [{"layer": 0}, {"layer": 4}, {"layer": 9}])
def test_a_cut_outside_the_decoder_is_refused(settings):
    with pytest.raises(Unsupported, match=r"fastv drops tokens before the layers \[\d\], and this decoder has 4: they"):
        FastV(**settings).cuts(4)


def test_a_budget_and_the_paper_s_share_are_not_both_given():
    with pytest.raises(ValueError, match=r"give fastv a budget, the mean over layers, or kept_share.*got both, 0.5"):
        FastV(budget=0.5, kept_share=0.5)
    with pytest.raises(ValueError, match=r"kept_share.*lies in \[0, 1\]; got 1.5"):
        FastV(kept_share=1.5)
    assert FastV(kept_share=0.25).with_budget(0.5) == FastV(budget=0.5)


def test_a_method_that_keeps_all_reports_the_dense_figures():
    model = build_deep("llava")
    inputs = inputs_for("llava", Prompts((((96, 70),),), (7,)), model)
    with mmaccel.applied(model, FastV(budget=1.0)) as run:
        model(**inputs, use_cache=True)
        report = run.report.to_dict()
    assert report["visual_tokens"] == report["visual_tokens_dense"] == 36
    assert report["prefill_flops"] == report["prefill_flops_dense"] > 0
