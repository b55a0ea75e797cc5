"""VisionZip reproduces the released code's choices and values, averages where that adds, and keeps its laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.vision_tokens.golden import load
from vision_tokens import ImageView, Layout, VisionZip
from vision_tokens.visionzip import absorb, choose, complement

FILES = ["anyres_2x2", "clip_64", "uneven_step"]


def pictures_of(name):
    """Per picture of a golden file: attention, keys and features without the class token, and what is expected."""
    tensors, _ = load(f"visionzip/{name}")
    dominant, contextual = int(tensors["dominant"]) - 1, int(tensors["contextual"])
    for attention, keys, features, indices, output in zip(
        tensors["cls_attn"].sum(dim=1)[:, 1:],
        tensors["metric"][:, 1:],
        tensors["hidden_states"][:, 1:],
        tensors["dominant_indices_sorted"][:, 1:] - 1,
        tensors["output"][:, 1:],
        strict=True,
    ):
        yield (attention, keys, features), (dominant, contextual), indices, output


@pytest.mark.parametrize("name", FILES)
def test_choices_and_sums_are_the_released_code_s(name):
    for (attention, keys, features), counts, indices, output in pictures_of(name):
        dominant, targets = choose(attention, *counts)
        assert torch.equal(dominant, indices)
        merged = absorb(features, keys, dominant, targets, "sum")
        torch.testing.assert_close(merged[torch.cat([dominant, targets])], output, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_the_method_puts_what_the_released_code_gives_on_its_cells(name):
    cases = list(pictures_of(name))
    attention, keys, features = (torch.stack(part) for part in zip(*(case[0] for case in cases), strict=True))
    (dominant, contextual), cells = cases[0][1], attention.shape[1]
    side = int(cells**0.5)
    view = ImageView(
        Layout(torch.arange(len(cases) * cells), len(cases), side, side),
        {"feature": attention[:, None]},
        {"feature": keys},
    )
    kept = dominant + contextual
    method = VisionZip(budget=len(cases) * kept, contextual=(contextual + 0.5) / kept, merging="sum")
    seats, merged = method.merge(view, features)
    assert (seats.sum(dim=1) == kept).all()
    for own, taken, (*_, indices, output) in zip(merged.split(kept), seats, cases, strict=True):
        places = taken.nonzero().squeeze(-1)
        assert torch.isin(indices, places).all()
        targets = places[~torch.isin(places, indices)]
        order = torch.cat([indices, targets]).argsort()
        torch.testing.assert_close(own, output[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kept", "contextual"), [(64, 10), (128, 20), (192, 30), (160, 25)])
def test_the_paper_s_counts_come_out(kept, contextual):
    assert int(kept * VisionZip().contextual) == contextual


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**31))
def test_merging_tokens_that_are_all_alike_changes_nothing(tokens, dominant, contextual, seed):
    """The mend: a mean of equal vectors is that vector, where the released sum is twice as long."""
    dominant = min(dominant, tokens)
    contextual = min(contextual, tokens - dominant)
    generator = torch.Generator().manual_seed(seed)
    scores, keys = torch.rand(tokens, generator=generator), torch.randn(tokens, 3, generator=generator)
    features = torch.randn(3, generator=generator).expand(tokens, 3)
    best, targets = choose(scores, dominant, contextual)
    assert (len(best), len(targets)) == (dominant, contextual)
    torch.testing.assert_close(absorb(features, keys, best, targets), features)
    assert sorted([*best.tolist(), *complement(best, tokens).tolist()]) == list(range(tokens))


def test_a_mean_weighs_every_token_alike():
    keys = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    merged = absorb(torch.tensor([[0.0], [3], [6], [5]]), keys, torch.tensor([3]), torch.tensor([0]))
    assert merged[[0, 3]].tolist() == [[3.0], [5.0]]


@pytest.mark.parametrize("contextual", [-0.1, 1.5])
def test_a_share_of_merged_tokens_outside_its_range_is_refused(contextual):
    with pytest.raises(ValueError, match=r"contextual, the share .* lies in \[0, 1\]; got .*paper's is 10 / 64"):
        VisionZip(contextual=contextual)


def test_another_way_to_merge_is_refused():
    with pytest.raises(ValueError, match="merging is 'mean' or 'sum'; got 'max'"):
        VisionZip(merging="max")
