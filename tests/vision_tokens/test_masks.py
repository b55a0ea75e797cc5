"""Masks, windows and deep-stacked features behind a cut: what the laws would say if they were cut wrongly."""

from types import SimpleNamespace

import pytest
import torch

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.tiny import Prompts, build, inputs_for
from vision_tokens import HiRED, PooledTokens
from vision_tokens.cutting import Cutter, gather_finished
from vision_tokens.laws import generated, kept_prompt, language_input_laws, largest_difference, masked_logits

METHOD = HiRED(budget=0.25)


def broken(model, inputs, method=None):
    laws = {law.law: law for law in language_input_laws(model, method or METHOD, inputs, 12)}
    assert laws["keeping everything is the dense model"].passed
    return not laws["dropping equals masking"].passed


def without_windows(masks):
    return {**masks, "sliding_attention": masks["full_attention"]}


def looking_back_only(masks):
    first = {kind: mask.shape[-1] - mask.shape[-2] for kind, mask in masks.items() if mask is not None}
    return {
        kind: None if mask is None else mask & torch.ones_like(mask).tril(first[kind]) for kind, mask in masks.items()
    }


@pytest.mark.parametrize("change", [dict, without_windows, looking_back_only])
def test_gemma_s_windows_lie_on_original_places_and_its_pictures_attend_both_ways(change, monkeypatch):
    """The window is shorter than the prompt and longer than what is kept: counted there, it would hide nothing."""
    model = build("gemma3")
    inputs = inputs_for("gemma3", Prompts((((48, 48), (48, 48)),), (7,)), model)

    def changed(masks, *others):
        return gather_finished(change(masks), *others)

    monkeypatch.setattr("vision_tokens.cutting.gather_finished", changed)
    assert broken(model, inputs) == (change is not dict)


@pytest.mark.parametrize("types", [0, 1, None])
def test_paligemma_s_prefix_attends_both_ways_if_the_processor_says_so(types):
    """Types 0 are a prefix that attends both ways, 1 a suffix; a prompt without types is causal."""
    model = build("paligemma")
    inputs = inputs_for("paligemma", Prompts((((48, 48),), ((48, 48),)), (7, 9)), model)
    given = torch.full_like(inputs["input_ids"], types or 0)
    given = {} if types is None else {"token_type_ids": given}
    inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"} | given
    assert not broken(model, inputs)
    with mmaccel.applied(model, HiRED(budget=0.25)), torch.no_grad():
        first = model(**inputs).logits[:, 0]
        later = {**inputs, "input_ids": inputs["input_ids"].clone()}
        later["input_ids"][:, -1] = 3
        seen = not torch.equal(model(**later).logits[1, 0], first[1])
    assert seen == (types == 0)


@pytest.mark.parametrize("method", [HiRED(budget=0.25), PooledTokens(budget=0.25)], ids=lambda method: method.name)
@pytest.mark.parametrize("wrong", [False, True], ids=["as-it-is", "moved-by-one"])
def test_deep_stacked_features_stay_with_their_tokens(wrong, method, monkeypatch):
    model = build("qwen3_vl")
    inputs = inputs_for("qwen3_vl", Prompts((((96, 70),), (), ((48, 96), (96, 96))), (7, 5, 8)), model)
    right = Cutter._cut_deepstack

    def cut(kwargs, keep, index):
        right(kwargs, keep, index)
        if wrong and kwargs.get("deepstack_visual_embeds"):
            kwargs["deepstack_visual_embeds"] = [one.roll(1, dims=0) for one in kwargs["deepstack_visual_embeds"]]

    monkeypatch.setattr(Cutter, "_cut_deepstack", staticmethod(cut))
    assert broken(model, inputs, method) == wrong


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text", [(7,), (7, 12)], ids=["one", "batch"])
def test_windows_shorter_than_the_prompt_lie_on_original_places(attention, text):
    """A language model whose every layer looks back 16 places, in the prefill and in every later step."""
    model = build("llava-mistral", attention)
    inputs = inputs_for("llava-mistral", Prompts((((96, 70),), ((64, 96), (48, 48)))[: len(text)], text), model)
    with mmaccel.applied(model, METHOD):
        tokens, logits = generated(model, inputs, 24)
        reference = masked_logits(model, kept_prompt(model, inputs), tokens)
        assert largest_difference(logits, reference) < 1e-5
        _, anew = generated(model, {**inputs, "use_cache": False}, 24)
        assert largest_difference(logits, anew) < 1e-5


def test_windows_refuse_packed_positions_and_kernels_without_masks():
    with pytest.raises(Unsupported, match=r"look back a number of original places.*use positions='kept'"):
        mmaccel.apply(build("llava-mistral"), HiRED(positions="packed"))
    flash, index = SimpleNamespace(_attn_implementation="flash_attention_2"), torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(Unsupported, match=r"which flash_attention_2 does not take; load the model with attn_impl"):
        gather_finished({"sliding_attention": None}, flash, None, index, index)


def test_a_window_that_padding_made_too_short_is_refused():
    """Padding on the right stands between a prompt and what follows it, in a row that kept fewer tokens."""
    model = build("llava-mistral")
    prompts = Prompts((((48, 48), (48, 48)), ((48, 48),)), (3, 42), side="right")
    inputs = inputs_for("llava-mistral", prompts, model)
    with mmaccel.applied(model, METHOD), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=-1)
        with pytest.raises(Unsupported, match=r"let go of tokens that a row still needs.*pad prompts on the left"):
            model(input_ids=torch.tensor([[3], [4]]), attention_mask=mask, past_key_values=cache)
