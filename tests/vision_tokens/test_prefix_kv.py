"""PrefixKV reproduces the released code's budgets and evictions, and its parts keep what they promise."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

import mmaccel
from tests.vision_tokens.golden import load
from vision_tokens import PrefixKV
from vision_tokens.cache_room import Scored, make_room, packed, prune
from vision_tokens.kept_columns import held_length, layer_columns
from vision_tokens.layer_view import LayerView
from vision_tokens.prefix_kv import TOLERANCE, keep_most_attended, received, rescaled, searched_evictions, slot_of

GOLDENS = ["prune_L5_T64_r50", "profile_L6_T60_r60"]


def test_the_budgets_are_the_released_code_s():
    tensors, exact = load("prefixkv/layer_budgets_L8_T120")
    scores = tensors["score_sum"]
    layers, tokens = scores.shape
    for ratio, raw, scaled in zip(
        json.loads(exact["evict_ratio"]), tensors["evict_counts_raw"], tensors["evict_counts_rescaled"], strict=True
    ):
        target = ratio * layers * tokens
        counts = searched_evictions(scores, [tokens] * layers, target, int(tensors["protect"]))
        assert counts == raw.tolist()
        assert rescaled(counts, target) == scaled.tolist()


def golden_method(tensors, exact):
    start, end, distance = tensors["start_protect_distance"].tolist()
    if "layer_evict_ratios" in tensors:
        profile = {"layers": tuple((1 - tensors["layer_evict_ratios"].double()).tolist())}
    else:
        profile = {"budget": 1 - float(exact["evict_ratio"])}
    return PrefixKV(start=start, end=end, distance=distance, **profile)


@pytest.mark.parametrize("name", GOLDENS)
def test_evictions_from_a_cache_are_the_released_code_s_while_it_grows(name):
    tensors, exact = load(f"prefixkv/{name}")
    scores, (layers, heads, tokens, width) = tensors["attentions"].mean(dim=1).sum(dim=1), tensors["keys"].shape
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(tensors["keys"][layer, None], tensors["values"][layer, None], layer)
    scored = {layer: Scored(scores[layer, None]) for layer in range(layers)}
    (shares,) = prune(cache, golden_method(tensors, exact), scored, [tokens], tokens)
    torch.testing.assert_close(torch.tensor(shares), tensors["runtime_ratios"], rtol=0, atol=1e-7)

    def held():
        return torch.cat([layer_columns(cache)[layer].extended(length)[0] for layer, length in enumerate(lengths())])

    def lengths():
        return [layer.keys.shape[2] for layer in cache.layers]

    assert lengths() == tensors["kept_len_prefill"].tolist()
    assert torch.equal(held(), tensors["kept_ids_prefill"])
    expected = tensors["decode_kept_ids"].split(tensors["decode_lens"].sum(dim=-1).tolist())
    generator = torch.Generator().manual_seed(0)
    keys, values = tensors["keys"], tensors["values"]
    for step, ids in enumerate(expected):
        new = torch.randn(2, layers, heads, 1, width, generator=generator)
        keys, values = torch.cat([keys, new[0]], dim=2), torch.cat([values, new[1]], dim=2)
        for layer in range(layers):
            cache.update(new[0, layer, None], new[1, layer, None], layer)
        make_room(cache)
        assert lengths() == tensors["decode_lens"][step].tolist()
        assert torch.equal(held(), ids)
        assert held_length(cache) == cache.get_seq_length() == tokens + step + 1
        for layer, mine in zip(range(layers), held().split(lengths()), strict=True):
            assert torch.equal(cache.layers[layer].keys[0], keys[layer][:, mine])
            assert torch.equal(cache.layers[layer].values[0], values[layer][:, mine])


@pytest.mark.parametrize("name", GOLDENS)
def test_the_slots_are_the_released_code_s(name):
    tensors, _ = load(f"prefixkv/{name}")
    assert [slot_of(kept, -25) for kept in tensors["kept_len_prefill"].tolist()] == tensors[
        "decode_drop_position"
    ].tolist()
    assert slot_of(40, 7) == 7


@given(st.integers(1, 6), st.integers(8, 60), st.floats(0.05, 0.95), st.integers(0, 2**31))
def test_the_search_ends_near_its_target_or_evicts_all_it_may(layers, tokens, ratio, seed):
    scores = torch.rand(layers, tokens, generator=torch.Generator().manual_seed(seed)) ** 3 + 1e-3
    target = ratio * layers * tokens
    counts = searched_evictions(scores, [tokens] * layers, target, 2)
    assert all(0 <= count <= tokens - 2 for count in counts)
    if target <= layers * (tokens - 4):
        assert abs(sum(counts) - target) < max(TOLERANCE, layers + 1)
    scaled = rescaled(counts, target)
    assert sum(counts) == 0 or target - layers < sum(scaled) <= target + 1e-6


def test_layers_of_different_lengths_are_searched_as_if_each_stood_alone():
    generator = torch.Generator().manual_seed(1)
    short, long = torch.rand(20, generator=generator), torch.rand(50, generator=generator)
    together = torch.stack([torch.cat([short, torch.zeros(30)]), long])
    counts = searched_evictions(together, [20, 50], 30.0, 2)
    for score, count in zip((short, long), counts, strict=True):
        assert searched_evictions(score[None], [len(score)], float(count), 2) == pytest.approx([count], abs=TOLERANCE)
    keep = keep_most_attended(together, [20, 50], counts, 1, 1)
    assert keep.sum(dim=-1).tolist() == [20 - counts[0], 50 - counts[1]]
    assert not keep[0, 20:].any() and keep[0, [0, 19]].all() and keep[1, [0, 49]].all()


@given(st.integers(2, 40), st.integers(0, 3), st.integers(0, 3), st.data())
def test_every_kept_token_is_protected_or_scores_at_least_every_dropped_one(tokens, start, end, data):
    count = data.draw(st.integers(0, max(0, tokens - start - end)))
    scores = torch.rand(1, tokens, generator=torch.Generator().manual_seed(tokens))
    keep = keep_most_attended(scores, [tokens], [count], start, end)[0]
    assert int(keep.sum()) == tokens - count
    assert keep[:start].all() and (end == 0 or keep[-end:].all())
    free = slice(start, tokens - end)
    kept, dropped = scores[0][free][keep[free]], scores[0][free][~keep[free]]
    assert not len(kept) or not len(dropped) or kept.min() >= dropped.max()


@pytest.mark.parametrize("tokens", [40, 600])
def test_received_attention_is_the_column_sum_of_the_mean_over_query_heads(tokens):
    """Grouped queries, rows of padding, and more tokens than one block holds."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, tokens, 8, generator=generator) for heads in (4, 2))
    real = torch.ones(2, tokens, dtype=torch.bool)
    real[1, :5] = False
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() & real[:, None, None]
    mask |= torch.eye(tokens, dtype=torch.bool)
    attention = ((query @ key.repeat_interleave(2, dim=1).mT) * 0.3).masked_fill(~mask, -torch.inf).softmax(dim=-1)
    expected = (attention * real[:, None, :, None]).mean(dim=1).sum(dim=1)
    ours = received(LayerView(query, key, 0.3, mask, real, real))
    torch.testing.assert_close(ours[real], expected[real], rtol=1e-5, atol=1e-5)


def test_columns_are_packed_to_the_right_in_order():
    keep = torch.tensor([[True, False, True, True], [False, True, False, False]])
    assert packed(keep, 3).tolist() == [[0, 2, 3], [-1, -1, 1]]


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"give prefix-kv a budget, or layers, the share that each of them keeps"):
        PrefixKV(budget=0.5, layers=(0.5, 0.5))
    for given_wrong in ({"budget": 0.0}, {"budget": 1.5}, {"layers": (0.5, 0.0)}, {"budget": 1}):
        with pytest.raises(ValueError, match=r"the share of a cache that prefix-kv keeps lies in \(0, 1\]; got"):
            PrefixKV(**given_wrong)
    with pytest.raises(ValueError, match=r"start, a number of tokens, is 0 or more; got -1"):
        PrefixKV(start=-1)
    with pytest.raises(ValueError, match=r"positions are 'kept' or 'drifting'; got 'packed'"):
        PrefixKV(positions="packed")


def test_a_profile_is_plain_data_and_the_published_one_keeps_half():
    method = PrefixKV.preset("llava-1.5-7b-50")
    assert len(method.layers) == 32 and method.kept_share == pytest.approx(0.5, abs=0.005)
    assert mmaccel.recipe_from_data(json.loads(json.dumps(method.to_dict()))) == [method]
    assert method.with_budget(0.3) == PrefixKV(budget=0.3)
