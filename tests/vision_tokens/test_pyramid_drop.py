"""PyramidDrop's stages and ratios are the paper's, its look ahead is what the layer then computes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.deep import LAYERS, build_deep
from tests.vision_tokens.tiny import Prompts, inputs_for
from vision_tokens import PyramidDrop
from vision_tokens.attention_rows import recording
from vision_tokens.laws import generated
from vision_tokens.layer_cutting import per_layer
from vision_tokens.looking_ahead import Peek, attention_of


def test_stages_and_counts_are_the_paper_s():
    assert list(PyramidDrop().cuts(32)) == [8, 16, 24]
    assert PyramidDrop().kept(32, 576) == [288, 144, 72]
    assert PyramidDrop().kept(32, 2881) == [1440, 720, 360]
    assert PyramidDrop(budget=0.46875).kept(32, 576) == [288, 144, 72]  # the mean of 1, 1/2, 1/4 and 1/8


@given(st.integers(4, 60), st.integers(1, 3000), st.floats(0.01, 1.0))
def test_the_mean_over_layers_is_the_budget_but_for_rounding_down(layers, visual, budget):
    method = PyramidDrop(budget=budget)
    if budget == 1.0:
        assert method.cuts(layers) == ()
    elif budget < round(layers / 4) / layers - 1e-9:
        with pytest.raises(Unsupported, match=r"pyramid-drop leaves the first \d+ of \d+ layers all visual tokens"):
            method.cuts(layers)
    elif budget > max(1, round(layers / 4)) / layers:
        kept = dict(zip(method.cuts(layers), method.kept(layers, visual), strict=True))
        assert -1 <= sum(per_layer(visual, kept, layers)) / layers - budget * visual <= 1e-3


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_look_ahead_is_what_the_layer_computes_and_leaves_no_trace(family):
    """Nothing goes at ratio 1, so each layer computes just what was shown ahead of it."""
    model, shown = build_deep(family), []

    class Watching(PyramidDrop):
        def score(self, view):
            shown.append((view.key, view.rows(view.last)))
            return super().score(view)

    class Told(Watching):
        def kept(self, layers, visual):
            return [visual - 1] * 3  # so that scores are wanted, but no stage behind the first drops

    inputs = inputs_for(family, Prompts((((96, 70),), ((64, 96),)), (7, 12)), model)
    cut = 2
    with mmaccel.applied(model, Told(cut_before=(cut, 3, 4))) as run:
        attention = attention_of(model.model.language_model.layers[cut])
        with recording({attention: lambda q, k, scaling, mask: k}) as recorded:
            generated(model, inputs, 1)
        columns = run.report.details["layer_columns"]
    ((ahead, rows),), (then,) = shown, recorded[attention]  # ahead of time, and then in earnest
    index = columns[cut].index
    for row in range(2):
        kept = index[row][index[row] >= 0]
        torch.testing.assert_close(ahead[row][:, kept], then[row][:, index[row] >= 0])
    assert torch.isfinite(rows).all() and LAYERS > 4


def test_a_peek_shows_the_past_and_adds_nothing():
    from transformers import DynamicCache

    cache, past, new = DynamicCache(), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 1, 4)
    assert torch.equal(Peek(cache).update(new, new, 0)[0], new)
    cache.update(past, past, 0)
    keys, values = Peek(cache).update(new, 2 * new, 0)
    assert torch.equal(keys, torch.cat([past, new], dim=2)) and torch.equal(values[:, :, 3:], 2 * new)
    assert cache.get_seq_length() == Peek(cache).get_seq_length() == 3


def test_a_layer_with_other_than_one_attention_module_is_refused():
    with pytest.raises(Unsupported, match=r"a Linear has 0 attention modules; methods that read.*need one"):
        attention_of(torch.nn.Linear(1, 1))


def test_a_ratio_outside_its_range_is_refused():
    with pytest.raises(
        ValueError, match=r"ratio, the share of its tokens that a stage hands on, lies in \[0, 1\]; got"
    ):
        PyramidDrop(ratio=2.0)
    with pytest.raises(ValueError, match=r"give pyramid-drop a budget, the mean over layers, or ratio"):
        PyramidDrop(ratio=0.5, budget=0.5)
