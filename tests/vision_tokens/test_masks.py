"""Masks, windows and deep-stacked features behind a cut: what the laws would say if they were cut wrongly."""

import pytest
import torch

import mmaccel
from tests.vision_tokens.tiny import Prompts, build, inputs_for
from vision_tokens import HiRED, PooledTokens
from vision_tokens.cutting import Cutter, gather_finished
from vision_tokens.laws import language_input_laws


def broken(model, inputs, method=None):
    laws = {law.law: law for law in language_input_laws(model, method or HiRED(budget=0.25), inputs, 12)}
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
