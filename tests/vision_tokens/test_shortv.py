"""ShortV and NAAViT: the released code's numbers, the laws on every family, and what people do with a frozen model."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mmaccel
from mmaccel import Unsupported
from mmaccel.checks import check
from tests.vision_tokens.counting import bytes_of, counted_flops
from tests.vision_tokens.deep import LAYERS, build_deep
from tests.vision_tokens.golden import language_model, load
from tests.vision_tokens.product import PROMPTS, assert_held, product, quick_for
from tests.vision_tokens.test_decoder_generation import answered, prompt_of
from tests.vision_tokens.test_families import choice
from tests.vision_tokens.test_generation import continued
from tests.vision_tokens.tiny import Prompts, inputs_for
from vision_tokens import FastV, HiRED, PrefixKV, ShortV
from vision_tokens.cache_laws import evicted_logits, watched
from vision_tokens.families import find_host
from vision_tokens.freezing import Split
from vision_tokens.freezing_laws import freezing_laws, frozen_logits
from vision_tokens.laws import fingerprint, generated, largest_difference
from vision_tokens.prompts import set_visual_places
from vision_tokens.shortv import divergence, layer_contributions

SHORTV, NAAVIT = ShortV(layers=(5, 0, 3)), ShortV(budget=0.5, ffn=True)
METHODS = [SHORTV, NAAVIT]


@pytest.fixture
def llava():
    model = build_deep("llava")
    yield model
    if "_mmaccel_attachment" in vars(model):
        mmaccel.remove(model)


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


# The laws


@pytest.mark.parametrize(("method", "family", "prompt"), product(METHODS))
def test_the_laws_hold(method, family, prompt):
    model = build_deep(family)
    assert_held(freezing_laws(model, method, inputs_for(family, PROMPTS[prompt], model), 6), 5)


@pytest.mark.parametrize("family", quick_for(("llava", "qwen2_5_vl")))
def test_64_generated_tokens_equal_a_slow_reference_behind_a_cut(family):
    model = build_deep(family)
    inputs = inputs_for(family, PROMPTS["a batch with a text-only row"], model)
    with mmaccel.applied(model, choice(family, 0.5), SHORTV):
        tokens, logits = generated(model, inputs, 64)
        reference = frozen_logits(model, SHORTV, inputs, tokens)
    assert largest_difference(logits, reference) < 1e-4
    assert torch.equal(logits.argmax(-1), tokens)


@pytest.mark.parametrize("method", METHODS, ids=["shortv", "naavit"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_rows_one_by_one(llava, method, side):
    prompts = Prompts((((96, 70),), ((96, 70), (48, 48))), (7, 11), side=side)
    batch = inputs_for("llava", prompts, llava)
    with mmaccel.applied(llava, method), torch.no_grad():
        together = llava(**batch).logits
        for row in range(2):
            alone = llava(**inputs_for("llava", prompts.row(row), llava)).logits[0]
            assert largest_difference(together[row][batch["attention_mask"][row].bool()], alone) < 1e-5


def test_eager_and_sdpa_agree():
    found = []
    for attention in ("sdpa", "eager"):
        model = build_deep("llava", attention)
        with mmaccel.applied(model, SHORTV):
            found.append(generated(model, prompt_of(), 4)[1])
    assert largest_difference(*found) < 1e-5


def test_check_says_every_law_and_leaves_the_model_alone(llava):
    inputs = prompt_of()
    generated(llava, inputs, 1)  # transformers hangs hooks of its own into a model at its first call
    before = fingerprint(llava)
    report = check(llava, SHORTV, inputs=inputs)
    assert [law.law for law in report.laws][1] == "freezing equals undoing what a layer did"
    assert report.passed, str(report)
    assert fingerprint(llava) == before


def test_a_law_that_is_broken_fails(llava, monkeypatch):
    """Caught: keys of visual tokens that stand in other places than theirs."""
    right = Split.of
    monkeypatch.setattr(Split, "of", lambda resting: (lambda s: Split(s.text, s.rest.flip(1), s.order))(right(resting)))
    laws = {law.law: law for law in freezing_laws(llava, SHORTV, prompt_of())}
    assert not laws["freezing equals undoing what a layer did"].passed


# The work


def test_visual_tokens_leave_the_work_of_frozen_layers(llava):
    seen = {"q_proj": [], "k_proj": [], "mlp": []}
    handles = []
    for layer in llava.model.language_model.layers:
        attention = layer.self_attn
        for name, module in (("k_proj", attention.k_proj), ("mlp", layer.mlp)):
            hook = lambda module, args, name=name: seen[name].append(args[0].shape[1])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    inputs = prompt_of()
    whole, text = inputs["input_ids"].shape[1], inputs["input_ids"].shape[1] - 36
    with mmaccel.applied(llava, ShortV(layers=(0, 3))):
        generated(llava, inputs, 1)
    for handle in handles:
        handle.remove()
    assert seen["mlp"] == [text, whole, whole, text, whole, whole]
    assert seen["k_proj"] == [36, text, whole, whole, 36, text, whole, whole]


@pytest.mark.parametrize("methods", [[SHORTV], [NAAVIT], [FastV(budget=0.6), SHORTV], [HiRED(budget=0.5), NAAVIT]],
                         ids=["shortv", "naavit", "with-fastv", "behind-hired"])  # fmt: skip
@pytest.mark.parametrize("rows", [1, 2])
def test_flops_and_bytes_are_what_an_outsider_counts(llava, methods, rows):
    inputs = inputs_for("llava", Prompts((((96, 70),), ((64, 96),))[:rows], (7, 12)[:rows]), llava)
    with counted_flops(find_host(llava).text) as counted, torch.no_grad(), mmaccel.applied(llava, *methods) as run:
        cache = llava(**inputs, use_cache=True).past_key_values
        report = run.report.to_dict()
    assert [report["prefill_flops"] + report.get("selection_flops", 0)] == counted
    assert report["prefill_flops"] < report["prefill_flops_dense"]
    assert report["kv_bytes"] == bytes_of(cache)
    assert report["frozen_layers"] == sorted(methods[-1].frozen(LAYERS))
    if methods == [SHORTV]:
        visual = int((inputs["input_ids"] == 99).sum())
        assert (report["visual_tokens"], report["visual_tokens_dense"]) == (visual / 2, visual)
        assert report["kv_bytes"] == report["kv_bytes_dense"]
    assert {"prefill"} <= set(report["seconds"])


def test_a_frozen_layer_costs_what_the_paper_says(llava):
    """Section 3.3: 4vh^2 for a layer's keys and values of v visual tokens, beside the text's own work."""
    inputs = prompt_of()
    visual, text, width, inner = 36, inputs["input_ids"].shape[1] - 36, 32, 64
    keys = width // 2  # two key heads for four query heads
    saved = visual * (2 * 2 * width * width + 3 * 2 * width * inner) + 4 * visual * (text + visual) * width
    assert keys * 2 == width
    for layers, times in (((0,), 1), ((0, 1, 4), 3)):
        with mmaccel.applied(llava, ShortV(layers=layers)) as run:
            generated(llava, inputs, 1)
            report = run.report.to_dict()
        assert report["prefill_flops_dense"] - report["prefill_flops"] == times * saved


# What people do


def test_a_second_turn_with_and_without_an_image_equals_one_long_prompt(llava):
    inputs, question = prompt_of(), torch.tensor([[11, 5, *[99] * 36, 6, 12]])
    with mmaccel.applied(llava, SHORTV):
        answer, _, cache = answered(llava, inputs, 4)
        second = {**continued(inputs, answer, question), "pixel_values": inputs["pixel_values"]}
        _, logits, _ = answered(llava, second, 3, past_key_values=cache)
        whole = {**second, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}
        _, expected, _ = answered(llava, whole, 3)
    assert largest_difference(logits, expected) < 1e-5


def test_all_stages_run_once_and_equal_the_slow_reference(llava):
    """HiRED, FastV, ShortV and PrefixKV, in whatever order they are given."""
    inputs = prompt_of()
    methods = [PrefixKV(budget=0.5), SHORTV, FastV(budget=0.6, layer=2), HiRED(budget=0.5)]
    with mmaccel.applied(llava, *methods) as run:
        generated(llava, inputs, 6)
        report = run.report.to_dict()
        names = [method["method"] for method in report["methods"]]
        assert names == ["hired", "fastv", "shortv", "prefix-kv"]
    assert report["prefill_flops"] < 0.5 * report["prefill_flops_dense"]
    assert report["kv_bytes"] < 0.4 * report["kv_bytes_dense"]


def test_scores_of_a_frozen_layer_are_those_of_the_text_alone(llava):
    """PrefixKV behind ShortV evicts as one that reads the attention of the reference with its outputs put back."""
    inputs = prompt_of()
    with mmaccel.applied(llava, ShortV(layers=(LAYERS - 1,)), PrefixKV(budget=0.5)) as run, watched(llava) as history:
        tokens, logits = generated(llava, inputs, 6)
        frozen = run.report.details["evicted_shares"]
        # the last layer's visual outputs are never read: what differs is whose attention was summed up, nothing else
        assert largest_difference(logits, evicted_logits(llava, inputs, tokens, history)) < 1e-5
    with mmaccel.applied(llava, PrefixKV(budget=0.5)) as run:
        generated(llava, inputs, 6)
        assert run.report.details["evicted_shares"] != frozen


def test_four_threads_at_once_get_their_own_answers(llava):
    prompts = [prompt_of(seed=seed) for seed in range(4)]
    mmaccel.apply(llava, SHORTV)
    alone = [generated(llava, inputs, 4)[1] for inputs in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda inputs: generated(llava, inputs, 4)[1], prompts * 2))
    assert all(torch.equal(*pair) for pair in zip(together, alone * 2, strict=True))


def test_a_text_only_prompt_runs_as_the_dense_model(llava):
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    _, dense = generated(llava, inputs, 4)
    with mmaccel.applied(llava, SHORTV) as run:
        assert torch.equal(generated(llava, inputs, 4)[1], dense)
        assert run.report["visual_tokens"] == 0


def test_gradients_flow_to_the_projector_and_checkpointing_is_refused():
    model, inputs = copy.deepcopy(build_deep("llava")).train(), prompt_of()
    with mmaccel.applied(model, SHORTV):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradient = model.model.multi_modal_projector.linear_1.weight.grad
        assert bool(gradient.isfinite().all()) and gradient.abs().sum() > 0
        model.gradient_checkpointing_enable()
        with pytest.raises(Unsupported, match=r"gradient checkpointing takes a layer's cache away.*_disable\(\)"):
            model(**inputs, use_cache=False)


def test_lora_keeps_the_law():
    peft = pytest.importorskip("peft")
    model, inputs = copy.deepcopy(build_deep("llava")), prompt_of()
    config = peft.LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    with mmaccel.applied(wrapped, SHORTV):
        tokens, logits = generated(wrapped, inputs, 4)
        assert largest_difference(logits, frozen_logits(wrapped, SHORTV, inputs, tokens)) < 1e-5


# Choosing layers


def test_the_last_layer_costs_nothing_and_is_frozen_first(llava):
    samples = [prompt_of(seed=seed) for seed in range(2)]
    costs = layer_contributions(llava, samples)
    assert costs[-1] == pytest.approx(0, abs=1e-6) and all(cost > 1e-5 for cost in costs[:-1])
    method = ShortV.calibrated(llava, samples, budget=0.5)
    assert method.layers[0] == LAYERS - 1 and sorted(method.layers) == list(range(LAYERS))
    assert [costs[layer] for layer in method.layers] == sorted(costs)
    assert len(method.frozen(LAYERS)) == 3
    with pytest.raises(ValueError, match="a calibration needs at least one prompt"):
        layer_contributions(llava, [])


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


def test_flash_attention_is_refused_by_name():
    model = copy.deepcopy(build_deep("llava"))
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(Unsupported, match=r"which flash_attention_2 does not take; load the model with attn_impl"):
        mmaccel.apply(model, SHORTV)


def test_a_static_cache_is_refused_by_name(llava):
    with mmaccel.applied(llava, SHORTV), pytest.raises(Unsupported, match=r"static cache"):
        llava.generate(**prompt_of(), max_new_tokens=2, cache_implementation="static")


def test_a_freeze_may_stand_beside_a_cut_and_not_beside_itself(llava):
    mmaccel.apply(llava, SHORTV, FastV(budget=0.6))
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(llava, peft.LoraConfig(r=2, target_modules=r".*language_model.*v_proj"))
    with pytest.raises(Unsupported, match="decorated already, through an object that wraps it"):
        mmaccel.apply(wrapped, SHORTV)
