"""Frozen layers, as in ShortV and NAAViT: the laws on every family, the work that is left, and what people do."""

import copy

import pytest
import torch

import mmaccel
from mmaccel import Unsupported
from mmaccel.checks import check
from tests.vision_tokens.counting import bytes_of, counted_flops
from tests.vision_tokens.deep import LAYERS, build_deep
from tests.vision_tokens.product import PROMPTS, assert_held, product, quick_for
from tests.vision_tokens.test_families import choice
from tests.vision_tokens.tiny import Prompts, inputs_for
from tests.vision_tokens.usage import answered, continued, prompt_of, with_lora
from vision_tokens import FastV, HiRED, PrefixKV, ShortV
from vision_tokens.cache_laws import evicted_logits, watched
from vision_tokens.families import find_host
from vision_tokens.freezing_laws import freezing_laws, frozen_logits
from vision_tokens.laws import fingerprint, generated, largest_difference
from vision_tokens.resting import Split

SHORTV, NAAVIT = ShortV(layers=(5, 0, 3)), ShortV(budget=0.5, ffn=True)
METHODS = [SHORTV, NAAVIT]


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
def test_a_batch_equals_its_rows_one_by_one(deep, method, side):
    prompts = Prompts((((96, 70),), ((96, 70), (48, 48))), (7, 11), side=side)
    batch = inputs_for("llava", prompts, deep)
    with mmaccel.applied(deep, method), torch.no_grad():
        together = deep(**batch).logits
        for row in range(2):
            alone = deep(**inputs_for("llava", prompts.row(row), deep)).logits[0]
            assert largest_difference(together[row][batch["attention_mask"][row].bool()], alone) < 1e-5


def test_eager_and_sdpa_agree():
    found = []
    for attention in ("sdpa", "eager"):
        model = build_deep("llava", attention)
        with mmaccel.applied(model, SHORTV):
            found.append(generated(model, prompt_of(), 4)[1])
    assert largest_difference(*found) < 1e-5


def test_check_says_every_law_and_leaves_the_model_alone(deep):
    inputs = prompt_of()
    generated(deep, inputs, 1)  # transformers hangs hooks of its own into a model at its first call
    before = fingerprint(deep)
    report = check(deep, SHORTV, inputs=inputs)
    assert [law.law for law in report.laws][1] == "freezing equals undoing what a layer did"
    assert report.passed, str(report)
    assert fingerprint(deep) == before


def test_a_law_that_is_broken_fails(deep, monkeypatch):
    """Caught: keys of visual tokens that stand in other places than theirs."""
    right = Split.of
    monkeypatch.setattr(Split, "of", lambda resting: (lambda s: Split(s.text, s.rest.flip(1), s.order))(right(resting)))
    laws = {law.law: law for law in freezing_laws(deep, SHORTV, prompt_of())}
    assert not laws["freezing equals undoing what a layer did"].passed


# The work


def test_visual_tokens_leave_the_work_of_frozen_layers(deep):
    seen = {"q_proj": [], "k_proj": [], "mlp": []}
    handles = []
    for layer in deep.model.language_model.layers:
        attention = layer.self_attn
        for name, module in (("k_proj", attention.k_proj), ("mlp", layer.mlp)):
            hook = lambda module, args, name=name: seen[name].append(args[0].shape[1])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    inputs = prompt_of()
    whole, text = inputs["input_ids"].shape[1], inputs["input_ids"].shape[1] - 36
    with mmaccel.applied(deep, ShortV(layers=(0, 3))):
        generated(deep, inputs, 1)
    for handle in handles:
        handle.remove()
    assert seen["mlp"] == [text, whole, whole, text, whole, whole]
    assert seen["k_proj"] == [36, text, whole, whole, 36, text, whole, whole]


@pytest.mark.parametrize("methods", [[SHORTV], [NAAVIT], [FastV(budget=0.6), SHORTV], [HiRED(budget=0.5), NAAVIT]],
                         ids=["shortv", "naavit", "with-fastv", "behind-hired"])  # fmt: skip
@pytest.mark.parametrize("rows", [1, 2])
def test_flops_and_bytes_are_what_an_outsider_counts(deep, methods, rows):
    inputs = inputs_for("llava", Prompts((((96, 70),), ((64, 96),))[:rows], (7, 12)[:rows]), deep)
    with counted_flops(find_host(deep).text) as counted, torch.no_grad(), mmaccel.applied(deep, *methods) as run:
        cache = deep(**inputs, use_cache=True).past_key_values
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


def test_a_frozen_layer_costs_what_the_paper_says(deep):
    """Section 3.3: 4vh^2 for a layer's keys and values of v visual tokens, beside the text's own work."""
    inputs = prompt_of()
    visual, text, width, inner = 36, inputs["input_ids"].shape[1] - 36, 32, 64
    keys = width // 2  # two key heads for four query heads
    saved = visual * (2 * 2 * width * width + 3 * 2 * width * inner) + 4 * visual * (text + visual) * width
    assert keys * 2 == width
    for layers, times in (((0,), 1), ((0, 1, 4), 3)):
        with mmaccel.applied(deep, ShortV(layers=layers)) as run:
            generated(deep, inputs, 1)
            report = run.report.to_dict()
        assert report["prefill_flops_dense"] - report["prefill_flops"] == times * saved


# What people do


def test_a_second_turn_with_and_without_an_image_equals_one_long_prompt(deep):
    inputs, question = prompt_of(), torch.tensor([[11, 5, *[99] * 36, 6, 12]])
    with mmaccel.applied(deep, SHORTV):
        answer, _, cache = answered(deep, inputs, 4)
        second = continued("llava", inputs, answer, question, inputs["pixel_values"])
        _, logits, _ = answered(deep, second, 3, past_key_values=cache)
        whole = {**second, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}
        _, expected, _ = answered(deep, whole, 3)
    assert largest_difference(logits, expected) < 1e-5


def test_all_stages_run_once_in_the_data_s_order(deep):
    """HiRED, FastV, ShortV and PrefixKV, in whatever order they are given."""
    inputs = prompt_of()
    methods = [PrefixKV(budget=0.5), SHORTV, FastV(budget=0.6, layer=2), HiRED(budget=0.5)]
    with mmaccel.applied(deep, *methods) as run:
        generated(deep, inputs, 6)
        report = run.report.to_dict()
        names = [method["method"] for method in report["methods"]]
        assert names == ["hired", "fastv", "shortv", "prefix-kv"]
    assert report["prefill_flops"] < 0.5 * report["prefill_flops_dense"]
    assert report["kv_bytes"] < 0.4 * report["kv_bytes_dense"]


def test_scores_of_a_frozen_layer_are_those_of_the_text_alone(deep):
    """PrefixKV behind ShortV evicts as one that reads the attention of the reference with its outputs put back."""
    inputs = prompt_of()
    with mmaccel.applied(deep, ShortV(layers=(LAYERS - 1,)), PrefixKV(budget=0.5)) as run, watched(deep) as history:
        tokens, logits = generated(deep, inputs, 6)
        frozen = run.report.details["evicted_shares"]
        # the last layer's visual outputs are never read: what differs is whose attention was summed up, nothing else
        assert largest_difference(logits, evicted_logits(deep, inputs, tokens, history)) < 1e-5
    with mmaccel.applied(deep, PrefixKV(budget=0.5)) as run:
        generated(deep, inputs, 6)
        assert run.report.details["evicted_shares"] != frozen


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
    wrapped, inputs = with_lora(copy.deepcopy(build_deep("llava"))), prompt_of()
    with mmaccel.applied(wrapped, SHORTV):
        tokens, logits = generated(wrapped, inputs, 4)
        assert largest_difference(logits, frozen_logits(wrapped, SHORTV, inputs, tokens)) < 1e-5


def test_flash_attention_is_refused_by_name():
    model = copy.deepcopy(build_deep("llava"))
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(Unsupported, match=r"which flash_attention_2 does not take; load the model with attn_impl"):
        mmaccel.apply(model, SHORTV)


def test_a_freeze_may_stand_beside_a_cut_and_not_beside_itself():
    model = copy.deepcopy(build_deep("llava"))
    mmaccel.apply(model, SHORTV, FastV(budget=0.6))
    with pytest.raises(Unsupported, match="decorated already, through an object that wraps it"):
        mmaccel.apply(with_lora(model), SHORTV)
