"""What people do with a model whose caches are pruned: it works, or refuses by name."""

import copy

import pytest
import torch

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.counting import bytes_of, counted_flops
from tests.vision_tokens.deep import LAYERS, build_deep
from tests.vision_tokens.tiny import Prompts, inputs_for, picture
from tests.vision_tokens.usage import answered, continued, prompt_of
from vision_tokens import FastV, HiRED, PrefixKV
from vision_tokens.cache_laws import History, evicted_logits, watched
from vision_tokens.cache_room import held_places
from vision_tokens.families import find_host
from vision_tokens.kept_columns import held_length, layer_columns
from vision_tokens.laws import generated, kept_prompt, largest_difference, masked_logits

METHOD = PrefixKV(budget=0.4, distance=-3)


@pytest.mark.parametrize("distance", [-25, -3, 4])
def test_the_cache_holds_what_the_plan_says_to_the_token(deep, distance):
    """Behind the prompt: all but the rounded share, and never less than what is protected; then as the share allows."""
    inputs, method = prompt_of(), PrefixKV(budget=0.2, distance=distance)
    length = inputs["input_ids"].shape[1]
    with mmaccel.applied(deep, method) as run:
        for tokens in (1, 2, 9, 30):
            _, _, cache = answered(deep, inputs, tokens)
            (shares,), report = run.report.details["evicted_shares"], run.report.to_dict()
            for layer, share in zip(cache.layers, shares, strict=True):
                held = length - min(round(share * length), length - 2)
                if tokens == 1:
                    assert layer.keys.shape[2] == layer.values.shape[2] == held
                for total in range(length + 1, length + tokens):
                    held = held + 1 - (int(held + 1 - total * (1 - share)) > 0)
                assert layer.keys.shape[2] == layer.values.shape[2] == held
            if tokens == 1:
                assert report["kv_bytes"] == bytes_of(cache) < 0.25 * report["kv_bytes_dense"]
            assert sum(layer.keys.shape[2] for layer in cache.layers) < 0.3 * LAYERS * (length + tokens)
    _, _, dense = answered(deep, inputs, 1)
    assert report["kv_bytes_dense"] == bytes_of(dense)


def test_new_tokens_have_the_positions_of_the_sequence_or_those_of_the_release(deep):
    inputs, length = prompt_of(), prompt_of()["input_ids"].shape[1]
    seen = []
    handle = deep.model.language_model.layers[3].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"].flatten().tolist()), with_kwargs=True
    )
    for positions in ("kept", "drifting"):
        seen.clear()
        with mmaccel.applied(deep, PrefixKV(layers=(0.5,) * LAYERS, positions=positions)):
            generated(deep, inputs, 6)
        assert seen[0] == list(range(length))
        if positions == "kept":
            assert seen[1:] == [[length + step] for step in range(5)]
        else:
            held = [length - round(0.5 * length)]
            for step in range(1, 5):
                held.append(held[-1] + 1 - (int(held[-1] + 1 - (length + step) * 0.5) > 0))
            assert seen[1:] == [[one] for one in held]
    handle.remove()


@pytest.mark.parametrize("before", [[], [HiRED(budget=0.5), FastV(budget=0.6)]], ids=["alone", "behind-others"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_second_turn_on_a_kept_cache_equals_masking(family, before):
    model, question = build_deep(family), torch.tensor([[11, 12, 13, 14, 15, 16]])
    inputs = prompt_of(family)
    with mmaccel.applied(model, *before, METHOD), watched(model) as history:
        answer, _, cache = answered(model, inputs)
        second = continued(family, inputs, answer, question)
        between = cache.layers[1].keys.shape[2]
        tokens, logits, cache = answered(model, second, past_key_values=cache)
        assert between < cache.layers[1].keys.shape[2] < between + 7 + 4
        reference = evicted_logits(model, inputs, torch.cat([answer, question, tokens], dim=1), history)[:, -5:]
    assert largest_difference(logits, reference) < 1e-5


def test_a_second_turn_with_a_new_image_prunes_its_prompt_alone(deep):
    inputs, later = prompt_of(seed=3), picture(5, 5, (1, 3, 48, 48))
    question = torch.tensor([[11, 5, *[99] * 36, 6, 12]])
    with mmaccel.applied(deep, METHOD) as run, watched(deep) as history:
        answer, _, cache = answered(deep, inputs, 4)
        first = held_places(cache, 3, held_length(cache))
        second = continued("llava", inputs, answer, question, later)
        tokens, logits, cache = answered(deep, second, 1, past_key_values=cache)
        columns, (shares,) = layer_columns(cache)[3].index, run.report.details["evicted_shares"]
        assert torch.equal(columns[:, : first.shape[1]], first)
        assert columns.shape[1] - first.shape[1] == 41 - round(shares[3] * 41)  # one token was not cached yet
        both = {**second, "pixel_values": torch.cat([inputs["pixel_values"], later])}
        total = second["input_ids"].shape[1]
        reference = masked_logits(deep, kept_prompt(deep, both), tokens, history.visible(total, {}))
    assert largest_difference(logits, reference) < 1e-5


def test_a_turn_that_was_read_before_the_method_came_stays_whole(deep):
    inputs, question = prompt_of(), torch.tensor([[11, 12, 13, 14, 15, 16]])
    answer, _, cache = answered(deep, inputs)
    past = cache.get_seq_length()
    second = continued("llava", inputs, answer, question)
    with mmaccel.applied(deep, PrefixKV(layers=(0.5,) * LAYERS)):
        _, _, cache = answered(deep, second, 1, past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [past + 7 - round(3.5)] * LAYERS
    assert held_length(cache) == cache.get_seq_length() == past + 7


def test_every_beam_scores_what_masking_gives_it(deep):
    prompts = Prompts((((96, 70),), ((64, 96), (48, 48))), (7, 12))
    with mmaccel.applied(deep, METHOD):
        out = deep.generate(
            **inputs_for("llava", prompts, deep),
            num_beams=3, num_return_sequences=3, length_penalty=0.0, max_new_tokens=5, min_new_tokens=5,
            do_sample=False, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        for beam, score in enumerate(out.sequences_scores):
            tokens, row = out.sequences[beam : beam + 1, -5:], inputs_for("llava", prompts.row(beam // 3), deep)
            with watched(deep) as history:  # what is held does not depend on the tokens
                generated(deep, row, 5)
            chances = evicted_logits(deep, row, tokens, history).log_softmax(-1)
            torch.testing.assert_close(chances.gather(-1, tokens[..., None]).sum(), score, rtol=1e-5, atol=1e-4)


def test_what_a_cache_knows_of_its_rows_goes_with_them(deep):
    inputs = inputs_for("llava", Prompts((((48, 48),), ((48, 48), (48, 48))), (7, 12)), deep)
    step = torch.tensor([[7], [8]])
    with mmaccel.applied(deep, METHOD), torch.no_grad():
        cache = deep(**inputs, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        twin.batch_repeat_interleave(2)
        twin.batch_select_indices(torch.tensor([0, 2]))
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=-1)
        for found, rows in ((cache, [1, 1]), (twin, [0, 1])):
            deep(input_ids=step, attention_mask=mask[rows], past_key_values=found)
        again = deep(**inputs, use_cache=True).past_key_values
        deep(input_ids=step, attention_mask=mask, past_key_values=again)
    for layer in range(LAYERS):
        ours, alone = layer_columns(twin)[layer].index, layer_columns(again)[layer].index
        assert torch.equal(ours, alone)
        row = layer_columns(cache)[layer].index
        assert torch.equal(row[0], row[1]) and row[0][row[0] >= 0].tolist() == alone[1][alone[1] >= 0].tolist()


def test_right_padding_holds_what_the_unpadded_rows_hold(deep):
    batch = inputs_for("llava", Prompts((((48, 48),), ((48, 48),)), (7, 12), side="right"), deep)
    with mmaccel.applied(deep, METHOD), torch.no_grad():
        together = layer_columns(deep(**batch).past_key_values)
        for row in range(2):
            real = batch["attention_mask"][row].bool()
            alone = deep(
                input_ids=batch["input_ids"][row : row + 1, real], pixel_values=batch["pixel_values"][row : row + 1]
            ).past_key_values
            for layer in range(LAYERS):
                held = together[layer].index[row]
                assert torch.equal(held[held >= 0], layer_columns(alone)[layer].index[0])


def test_a_text_only_prompt_is_pruned_too(deep):
    inputs = {"input_ids": torch.arange(3, 43)[None]}
    with mmaccel.applied(deep, PrefixKV(layers=(0.5,) * LAYERS)) as run:
        _, _, cache = answered(deep, inputs, 1)
        assert {layer.keys.shape[2] for layer in cache.layers} == {20}
        assert run.report["visual_tokens"] == 0 and run.report.facts["kv_tokens"] == [[20] * LAYERS]


def test_a_prompt_of_what_is_protected_stays_whole(deep):
    with mmaccel.applied(deep, METHOD):
        _, _, cache = answered(deep, {"input_ids": torch.tensor([[1, 5]])}, 1)
    assert {layer.keys.shape[2] for layer in cache.layers} == {2}


@pytest.mark.parametrize("rows", [1, 2])
def test_flops_are_what_an_outsider_counts(deep, rows):
    inputs = inputs_for("llava", Prompts((((96, 70),), ((64, 96),))[:rows], (7, 12)[:rows]), deep)
    with counted_flops(find_host(deep).text) as counted, torch.no_grad():
        for methods in ([METHOD], [FastV(budget=0.6), METHOD]):
            with mmaccel.applied(deep, *methods) as run:
                deep(**inputs, use_cache=True)
            assert run.report["prefill_flops"] + run.report["selection_flops"] == counted.pop()


def test_layers_that_keep_all_are_not_scored(deep):
    with mmaccel.applied(deep, PrefixKV(layers=(1.0, 0.5) * 3)) as run, torch.no_grad():
        some = deep(**prompt_of()).past_key_values
        half = run.report["selection_flops"]
    with mmaccel.applied(deep, PrefixKV(layers=(0.5,) * LAYERS)) as run, torch.no_grad():
        deep(**prompt_of())
        assert run.report["selection_flops"] == 2 * half
    assert sorted(layer_columns(some)) == [1, 3, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_equals_masking(dtype):
    model = copy.deepcopy(build_deep("llava")).to(dtype)
    inputs = prompt_of()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with mmaccel.applied(model, METHOD), watched(model) as history:
        tokens, logits = generated(model, inputs, 4)
        reference = evicted_logits(model, inputs, tokens, history)
    assert largest_difference(logits, reference) < (2e-2 if dtype == torch.float16 else 1e-1)


def test_a_call_with_gradients_evicts_without_writing_into_what_they_need(deep):
    with mmaccel.applied(deep, METHOD):
        cache = deep(**prompt_of()).past_key_values
        for token in range(3):
            out = deep(input_ids=torch.tensor([[5 + token]]), past_key_values=cache)
        out.logits.sum().backward()
    gradient = deep.model.language_model.layers[0].self_attn.k_proj.weight.grad
    assert gradient is not None and bool(gradient.isfinite().all())
    deep.zero_grad()


def test_a_profile_is_the_mean_of_what_prompts_get(deep):
    samples = [prompt_of(seed=seed) for seed in range(3)]
    method = PrefixKV.calibrated(deep, samples, budget=0.4)
    assert len(method.layers) == LAYERS and method.kept_share == pytest.approx(0.4, abs=0.03)
    assert "_mmaccel_attachment" not in vars(deep)
    with mmaccel.applied(deep, METHOD) as run:
        generated(deep, samples[0], 1)
        shares = torch.tensor(run.report.details["evicted_shares"][0])
    one = PrefixKV.calibrated(deep, samples[:1], budget=0.4)
    assert torch.allclose(1 - torch.tensor(one.layers), shares, atol=1e-5)
    with pytest.raises(ValueError, match="a profile needs at least one prompt"):
        PrefixKV.calibrated(deep, [], budget=0.4)


def test_the_marks_of_a_history_say_what_each_token_saw():
    held = [torch.tensor([[[True, False, True]]]), torch.tensor([[[True, False, True, True]]])]
    shown = History(held).visible(4, {})[0][0]
    assert shown[3].tolist() == [True, False, True, True] and shown[:3].all()


# Refusals


@pytest.mark.parametrize("kind", ["static", "offloaded"])
def test_other_caches_are_refused_by_name(deep, kind):
    from transformers import DynamicCache, StaticCache

    cache = {
        "static": lambda: StaticCache(deep.config.text_config, max_cache_len=80),
        "offloaded": lambda: DynamicCache(offloading=True),
    }[kind]()
    with mmaccel.applied(deep, METHOD), pytest.raises(Unsupported, match=r"prefix-kv evicts from a dynamic cache"):
        deep(**prompt_of(), past_key_values=cache)


def test_a_call_without_a_cache_is_refused(deep):
    with mmaccel.applied(deep, METHOD), pytest.raises(Unsupported, match=r"this call keeps none; leave use_cache on"):
        deep(**prompt_of(), use_cache=False)
    with mmaccel.applied(deep, PrefixKV(budget=1.0)):
        deep(**prompt_of(), use_cache=False)


def test_a_profile_of_another_model_is_refused(deep):
    with pytest.raises(Unsupported, match=r"prefix-kv's profile is for 2 layers, and this decoder has 6; make one"):
        mmaccel.apply(deep, PrefixKV(layers=(0.5, 0.5)))


def test_positions_that_count_what_layers_hold_are_refused(deep):
    with pytest.raises(Unsupported, match=r"prefix-kv takes some of them away; use positions='kept'"):
        mmaccel.apply(deep, FastV(positions="packed"), METHOD)
    with pytest.raises(Unsupported, match=r"M-RoPE\) cannot drift; use positions='kept'"):
        mmaccel.apply(build_deep("qwen2_5_vl"), PrefixKV(positions="drifting"))
