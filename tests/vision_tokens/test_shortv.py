"""ShortV and NAAViT: the released code's numbers, the choice of layers, and settings."""

import json

import pytest
import torch

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.deep import LAYERS
from tests.vision_tokens.golden import language_model, load
from tests.vision_tokens.usage import prompt_of
from vision_tokens import ShortV
from vision_tokens.prompts import set_visual_places
from vision_tokens.shortv import divergence, layer_contributions

# The released code


def golden(name):
    tensors, _ = load(f"naavit/{name}")
    hidden, intermediate, layers, heads, key_heads = tensors["config"].tolist()
    tensors["w.lm_head.weight"] = tensors.get("lm_head", torch.zeros(8, hidden))
    tensors.setdefault("w.model.embed_tokens.weight", torch.zeros_like(tensors["w.lm_head.weight"]))
    model = language_model(
        "llama", tensors, vocab_size=len(tensors["w.lm_head.weight"]), hidden_size=hidden,
        intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads,
    )  # fmt: skip
    start, length, _ = tensors["start_nvis_ntext"].tolist()
    visual = torch.zeros(tensors["inputs_embeds"].shape[:2], dtype=torch.bool)
    visual[:, start : start + length] = True
    return tensors, model, visual


def read_then_decode(model, tensors, visual):
    text = model.model.language_model
    with torch.no_grad():
        set_visual_places(visual)
        out = text(inputs_embeds=tensors["inputs_embeds"], use_cache=True)
        set_visual_places(None)
        steps = [
            text(inputs_embeds=step[None, None], past_key_values=out.past_key_values, use_cache=True).last_hidden_state
            for step in tensors["decode_inputs"]
        ]
    return out.last_hidden_state, torch.cat(steps)[:, 0]


def test_frozen_layers_give_the_released_code_s_hidden_states():
    tensors, model, visual = golden("shortv_tiny_L6")
    seen, start = [], int(tensors["start_nvis_ntext"][0])
    handles = [
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, start : start + 3]))
        for layer in model.model.language_model.layers
    ]
    with mmaccel.applied(model, ShortV(layers=tuple(tensors["frozen_layers"].tolist()))):
        hidden, decoded = read_then_decode(model, tensors, visual)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(hidden, tensors["hidden_final_normed"], rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(decoded, tensors["decode_hidden_final_normed"], rtol=1e-5, atol=5e-6)
    before = torch.stack(seen[: len(handles)])
    torch.testing.assert_close(before, tensors["visual_hidden_before_each_layer"], rtol=1e-5, atol=5e-6)
    for layer in set(tensors["frozen_layers"].tolist()) - {len(handles) - 1}:
        assert torch.equal(before[layer], before[layer + 1])


def test_what_freezing_a_layer_costs_is_the_released_code_s():
    tensors, model, visual = golden("shortv_tiny_L6")
    plain, found = model.lm_head(read_then_decode(model, tensors, visual)[0][:, -1]), []
    for layer in range(len(tensors["lc_scores"])):
        with mmaccel.applied(model, ShortV(layers=(layer,))):
            frozen = model.lm_head(read_then_decode(model, tensors, visual)[0][:, -1])
        found.append(divergence(frozen, plain))
    torch.testing.assert_close(torch.cat(found), tensors["lc_scores"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["saisa_tiny_L4", "saisa_tiny_gqa_L3"])
def test_visual_tokens_that_are_given_anew_in_every_layer_give_the_released_code_s_text(name):
    tensors, model, visual = golden(name)
    layers = list(model.model.language_model.layers)

    def give(number, module, args):
        if args[0].shape[1] == visual.shape[1]:
            return (args[0].masked_scatter(visual[..., None], tensors["visual_input_per_layer"][number]), *args[1:])
        return None

    handles = [
        layer.register_forward_pre_hook(lambda module, args, number=number: give(number, module, args))
        for number, layer in enumerate(layers)
    ]
    with mmaccel.applied(model, ShortV(layers=tuple(range(len(layers))))):
        hidden, decoded = read_then_decode(model, tensors, visual)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(hidden[~visual], tensors["text_hidden_final_normed"][0], rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(decoded, tensors["decode_hidden_final_normed"], rtol=1e-5, atol=5e-6)


# Choosing layers


def test_the_last_layer_costs_nothing_and_is_frozen_first(deep):
    samples = [prompt_of(seed=seed) for seed in range(2)]
    costs = layer_contributions(deep, samples)
    assert costs[-1] == pytest.approx(0, abs=1e-6) and all(cost > 1e-5 for cost in costs[:-1])
    method = ShortV.calibrated(deep, samples, budget=0.5)
    assert method.layers[0] == LAYERS - 1 and sorted(method.layers) == list(range(LAYERS))
    assert [costs[layer] for layer in method.layers] == sorted(costs)
    assert len(method.frozen(LAYERS)) == 3
    with pytest.raises(ValueError, match="a calibration needs at least one prompt"):
        layer_contributions(deep, [])


@pytest.mark.parametrize("preset", list(ShortV.presets))
def test_presets_are_plain_data_that_fit_their_models(preset):
    method = ShortV.preset(preset)
    layers = 40 if "13b" in preset else 32
    assert len(method.frozen(layers)) == {"naavit-7b": 32}.get(preset, {32: 19, 40: 24}[layers])
    assert mmaccel.recipe_from_data(json.loads(json.dumps(method.to_dict()))) == [method]


def test_without_names_the_deepest_layers_are_frozen():
    assert ShortV().frozen(10) == [4, 5, 6, 7, 8, 9]
    assert ShortV(budget=0.75).frozen(8) == [6, 7]
    assert ShortV(layers=(7, 1, 5), budget=0.75).frozen(8) == [1, 7]
    assert ShortV(budget=1.0).frozen(8) == []


# Refusals


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]; got 2. For all of them say 1.0"):
        ShortV(budget=2)
    with pytest.raises(ValueError, match=r"shortv's layers are numbers from 0 up, each once; got \(1, 1\)"):
        ShortV(layers=(1, 1))
    with pytest.raises(Unsupported, match=r"shortv freezes layer 31, and this decoder has the layers 0..5"):
        ShortV.preset("llava-1.5-7b").frozen(6)
    with pytest.raises(Unsupported, match=r"freezes 4 of 8 layers, and only 2 are named; raise it to 0.75, or"):
        ShortV(layers=(6, 7), budget=0.5).frozen(8)
