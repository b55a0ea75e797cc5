"""What people do with a model whose layers hold different tokens: it works, or refuses by name."""

import copy

import pytest
import torch

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.counting import bytes_of, counted_flops
from tests.vision_tokens.deep import LAYERS, build_deep
from tests.vision_tokens.tiny import FAMILIES, Prompts, inputs_for, picture
from tests.vision_tokens.usage import answered, continued, prompt_of, with_lora
from vision_tokens import AIM, FastV, HiRED, PyramidDrop, SparseVLM
from vision_tokens.decoder_laws import layerwise_masked_logits
from vision_tokens.families import find_host
from vision_tokens.kept_columns import held_length, layer_columns
from vision_tokens.laws import generated, kept_prompt, largest_difference, masked_logits
from vision_tokens.layer_cutting import per_layer
from vision_tokens.oracle import Read, read_by

METHOD = FastV(budget=0.6, layer=2)
TURNS = ["llava", "llava_next", "qwen2_5_vl", "smolvlm"]


@pytest.mark.parametrize("before", [[], [HiRED(budget=0.5)]], ids=["alone", "behind-hired"])
@pytest.mark.parametrize("family", TURNS)
def test_a_second_turn_on_a_kept_cache_equals_masking(family, before):
    model, question = build_deep(family), torch.tensor([[11, 12, 13, 14]])
    inputs = prompt_of(family)
    with mmaccel.applied(model, *before, METHOD):
        answer, _, cache = answered(model, inputs)
        second = continued(family, inputs, answer, question)
        tokens, logits, _ = answered(model, second, past_key_values=cache)
        reference = layerwise_masked_logits(model, inputs, torch.cat([answer, question, tokens], dim=1))[:, -5:]
    assert largest_difference(logits, reference) < 1e-5


def test_a_second_turn_with_a_new_image_cuts_it_too(deep):
    inputs, later = prompt_of(seed=3), picture(5, 5, (1, 3, 48, 48))
    question = torch.tensor([[11, 5, *[99] * 36, 6, 12]])
    with mmaccel.applied(deep, METHOD) as run:
        answer, _, cache = answered(deep, inputs, 4)
        first, held = layer_columns(cache)[3], held_length(cache)
        second = continued("llava", inputs, answer, question, later)
        tokens, logits, cache = answered(deep, second, 4, past_key_values=cache)
        columns = layer_columns(cache)[3].index
        assert torch.equal(columns[:, : first.index.shape[1]], first.index)
        kept = run.report.facts["cuts"][0]["visual_tokens"]
        assert columns.shape[1] == held - first.dropped + 1 + 4 + kept  # a token not cached yet, text, the image
        assert held_length(cache) == cache.get_seq_length() == held + 1 + 4 + 36 + 3  # and the answer but one
        both = {**second, "pixel_values": torch.cat([inputs["pixel_values"], later])}
        marks = torch.zeros(1, second["input_ids"].shape[1], dtype=torch.bool).scatter(1, columns, True)
        reference = masked_logits(deep, kept_prompt(deep, both), tokens, dict.fromkeys(range(2, LAYERS), marks))
    assert largest_difference(logits, reference) < 1e-5


@pytest.mark.parametrize("family", TURNS)
def test_every_beam_scores_what_masking_gives_it(family):
    model = build_deep(family)
    prompts = Prompts((((96, 70),), ((64, 96), (48, 48))), (7, 12))
    inputs = inputs_for(family, prompts, model)
    with mmaccel.applied(model, METHOD):
        out = model.generate(
            **inputs, num_beams=3, num_return_sequences=3, length_penalty=0.0, max_new_tokens=5, min_new_tokens=5,
            do_sample=False, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        for beam, score in enumerate(out.sequences_scores):
            tokens = out.sequences[beam : beam + 1, -5:]
            row = inputs_for(family, prompts.row(beam // 3), model)
            generated(model, row, 1)
            chances = layerwise_masked_logits(model, row, tokens).log_softmax(-1)
            torch.testing.assert_close(chances.gather(-1, tokens[..., None]).sum(), score, rtol=1e-5, atol=1e-4)


def test_what_a_cache_knows_of_its_rows_goes_with_them(deep):
    inputs = inputs_for("llava", Prompts((((48, 48),), ((48, 48), (48, 48))), (7, 12)), deep)
    with mmaccel.applied(deep, METHOD), torch.no_grad():
        cache = deep(**inputs, use_cache=True).past_key_values
    before, twin = layer_columns(cache)[4].index, copy.deepcopy(cache)
    assert not torch.equal(before[0], before[1])
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer_columns(cache)[4].index, before[[1, 1]])
    twin.batch_repeat_interleave(2)
    assert torch.equal(layer_columns(twin)[4].index, before[[0, 0, 1, 1]])
    twin.batch_select_indices(torch.tensor([0, 2]))
    assert torch.equal(layer_columns(twin)[4].index, before)
    assert layer_columns(twin)[4] is layer_columns(twin)[5]


def test_the_tail_of_every_layer_can_be_cropped(deep):
    with mmaccel.applied(deep, METHOD):
        _, _, cache = answered(deep, prompt_of(), 4)
    seen, lengths = cache.get_seq_length(), [layer.keys.shape[2] for layer in cache.layers]
    assert len(set(lengths)) == 2
    cache.crop(-2)
    assert cache.get_seq_length() == seen - 2
    assert [layer.keys.shape[2] for layer in cache.layers] == [length - 2 for length in lengths]
    with pytest.raises(ValueError, match=r"only the \d+ tokens behind the last dropped one can be cropped.*got -50"):
        cache.crop(-50)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_positions_count_what_each_layer_holds(attention):
    """By hand: two runs of layers, each on its tokens, numbered from zero."""
    model = build_deep("llava", attention)
    inputs = prompt_of()
    with mmaccel.applied(model, FastV(budget=0.6, positions="packed")) as run:
        tokens, logits = generated(model, inputs, 5)
        read, index = read_by(model, inputs), run.report.details["layer_columns"][2].index
    text = model.model.language_model
    with torch.no_grad():
        hidden = torch.cat([read.embeddings, model.get_input_embeddings()(tokens[:, :-1])], dim=1)
        new = torch.arange(read.embeddings.shape[1], hidden.shape[1])[None]
        for number, layer in enumerate(text.layers):
            if number == 2:
                hidden = hidden[:, torch.cat([index, new], dim=1)[0]]
            length = hidden.shape[1]
            mask = torch.full((length, length), torch.finfo(hidden.dtype).min).triu(1)[None, None]
            tables = text.rotary_emb(hidden, torch.arange(length)[None])
            hidden = layer(hidden, attention_mask=mask, position_embeddings=tables)
        reference = model.lm_head(text.norm(hidden[:, -5:]))
    assert largest_difference(logits, reference) < 1e-5


def test_hidden_states_and_attentions_are_those_of_each_layer_s_tokens():
    model, inputs = build_deep("llava", "eager"), prompt_of()
    whole = inputs["input_ids"].shape[1]
    with mmaccel.applied(model, METHOD) as run, torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
        held = whole - 36 + run.report.facts["cuts"][0]["visual_tokens"]
    assert [rows.shape[-2:] for rows in out.attentions] == [(whole, whole)] * 2 + [(held, held)] * 4
    assert {state.shape[1] for state in out.hidden_states} == {whole, held}
    assert out.logits.shape[1] == held


COUNTED = [(METHOD, family) for family in FAMILIES] + [
    (method, family) for family in ("llava", "qwen2_5_vl")
    for method in (AIM(budget=0.5, merged=1.0), PyramidDrop(budget=0.6), SparseVLM(budget=0.6, recycle=False))
]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("method", "family"), COUNTED, ids=lambda value: getattr(value, "name", value))
def test_flops_and_bytes_are_what_an_outsider_counts(method, family, rows):
    model = build_deep(family)
    inputs = inputs_for(family, Prompts((((96, 70),), ((64, 96),))[:rows], (7, 12)[:rows]), model)
    with counted_flops(find_host(model).text) as counted, torch.no_grad(), mmaccel.applied(model, method) as run:
        cache = model(**inputs, use_cache=True).past_key_values
        report = run.report.to_dict()
        with mmaccel.applied(model, method.with_budget(1.0)):
            dense = model(**inputs, use_cache=True).past_key_values
    assert [report["prefill_flops"] + report["selection_flops"], report["prefill_flops_dense"]] == counted
    assert report["kv_bytes"] == bytes_of(cache) <= report["kv_bytes_dense"] == bytes_of(dense)
    visual = int((inputs["input_ids"] == 99).sum())
    held = per_layer(visual, {cut["layer"]: cut["visual_tokens"] for cut in report["cuts"]}, LAYERS)
    assert report["visual_tokens_dense"] == visual
    assert report["visual_tokens"] == pytest.approx(sum(held) / LAYERS)
    assert report["visual_tokens"] == pytest.approx(method.budget * visual, abs=rows)


def test_reports_of_two_mechanisms_add_up(deep):
    inputs = prompt_of()
    with mmaccel.applied(deep, HiRED(budget=0.5), FastV(budget=0.5)) as run:
        generated(deep, inputs, 2)
        report = run.report.to_dict()
    assert report["visual_tokens_dense"] == 36 and report["visual_tokens"] == pytest.approx(36 * 0.5 * 0.5, abs=1)
    assert report["prefill_flops"] < 0.5 * report["prefill_flops_dense"]
    assert report["cuts"] == [{"layer": 2, "visual_tokens": 4}]
    assert {"encode", "prefill", "decode"} <= set(report["seconds"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_equals_masking(dtype):
    model = copy.deepcopy(build_deep("llava")).to(dtype)
    inputs = prompt_of()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with mmaccel.applied(model, METHOD):
        tokens, logits = generated(model, inputs, 4)
        reference = layerwise_masked_logits(model, inputs, tokens)
    assert largest_difference(logits, reference) < (2e-2 if dtype == torch.float16 else 1e-1)


def test_lora_keeps_the_law():
    model, inputs = copy.deepcopy(build_deep("llava")), prompt_of()
    wrapped = with_lora(model)
    with mmaccel.applied(wrapped, METHOD):
        tokens, logits = generated(wrapped, inputs, 4)
        assert largest_difference(logits, layerwise_masked_logits(wrapped, inputs, tokens)) < 1e-5
        with pytest.raises(Unsupported, match=r"LlavaModel is decorated already, through an object that wraps it"):
            mmaccel.apply(model.model, METHOD)


def test_tokens_leave_the_work_and_not_only_the_mask(deep):
    widths = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
        for layer in deep.model.language_model.layers
    ]
    inputs = prompt_of()
    with mmaccel.applied(deep, FastV(kept_share=0.25)):
        generated(deep, inputs, 1)
    for handle in handles:
        handle.remove()
    whole = inputs["input_ids"].shape[1]
    assert widths == [whole] * 2 + [whole - 27] * 4


# Refusals


def test_a_kernel_that_changed_since_apply_is_refused():
    model, inputs = copy.deepcopy(build_deep("llava")), prompt_of()
    with mmaccel.applied(model, METHOD):
        model.set_attn_implementation("eager")
        with pytest.raises(Unsupported, match=r"was 'sdpa' when fastv was applied, and is 'eager' now; call mmaccel"):
            model(**inputs)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(Unsupported, match=r"this model runs 'flex_attention': call model.set_attn_implementation"):
        mmaccel.apply(model, METHOD)


def test_two_methods_that_prune_the_decoder_are_refused(deep):
    class Another(FastV):
        name = "another"

    mmaccel.apply(deep, METHOD)
    with pytest.raises(ValueError, match=r"fastv and another both act on the stage 'decoder'.*mmaccel.remove"):
        mmaccel.apply(deep, Another())


def test_an_oracle_of_rows_that_differ_is_refused(deep):
    from vision_tokens.oracle import Oracle

    read = Read(torch.zeros(1, 4, 32), torch.arange(4)[None], None, {2: torch.tensor([[-1, 1, 3]])})
    with pytest.raises(ValueError, match="needs rows of one length; pass one row"):
        Oracle(deep, read)


@pytest.mark.parametrize("layers", [6, 7, 16])
def test_the_least_budget_is_one_that_the_method_takes(layers):
    method = FastV(layer=2)
    least, _ = method.knob_range_on(build_deep("llava", layers=layers))
    assert least == pytest.approx(2 / layers)
    assert method.with_budget(least).kept(layers, 100) == (0,)


@pytest.mark.parametrize("method", [FastV(layer=2), AIM(), PyramidDrop(), SparseVLM()], ids=lambda method: method.name)
def test_a_budget_is_tuned_within_what_the_method_can_reach(deep, method):
    inputs = prompt_of()
    low, high = method.knob_range_on(deep)
    assert high == 1.0
    method.with_budget(low).cuts(LAYERS)
    if method.name != "aim":  # merging takes over from the ramp
        assert low == pytest.approx(method.cuts(LAYERS)[0] / LAYERS)
        with pytest.raises(Unsupported, match=r"out of reach: raise it"):
            method.with_budget(low - 1e-3).cuts(LAYERS)
    dense = mmaccel.tune(deep, method, inputs, kv_bytes=1e12).measured
    tuned = mmaccel.tune(deep, method, inputs, kv_bytes=0.8 * dense)
    assert tuned.measured == pytest.approx(0.8 * dense, rel=0.05)
