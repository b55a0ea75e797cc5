"""PruMerge and PruMerge+ reproduce the released code's choices and values, and keep their laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.vision_tokens.golden import load
from vision_tokens import ImageView, Layout, PruMerge
from vision_tokens.attention_rows import class_attention, heads_joined, patch_keys
from vision_tokens.prumerge import adaptive, fixed

METHODS = {
    "adaptive_iqr": PruMerge(),
    "fixed_ratio_12": PruMerge(budget=int(576 * 0.12) + 1),
    "plus_adaptive": PruMerge(spatial=True),
}


def view_of(tensors):
    """What the method sees of a golden file's picture, read from queries and keys as the mechanism reads them."""
    query, key = (tensors[name].unflatten(-1, (2, -1)).transpose(1, 2) for name in ("q_proj_out", "k_proj_out"))
    attention = heads_joined(class_attention)(query, key, 0.0, None)
    keys = heads_joined(patch_keys)(query, key, 0.0, None)
    return ImageView(Layout(torch.arange(576), 1, 24, 24), {"last": attention}, {"last": keys.mT})


@pytest.mark.parametrize("name", METHODS)
def test_attention_of_joined_heads_is_the_released_code_s(name):
    tensors, _ = load(f"prumerge/{name}")
    torch.testing.assert_close(view_of(tensors).attention["last"][0], tensors["cls_attn"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adaptive_iqr", "plus_adaptive"])
def test_the_share_of_outliers_is_the_released_code_s(name):
    tensors, exact = load(f"prumerge/{name}")
    assert len(adaptive(tensors["cls_attn"][0])) == int(576 * float(exact["ratio"]))


@pytest.mark.parametrize("name", METHODS)
def test_kept_tokens_and_values_are_the_released_code_s(name):
    """The release gives them in its own order, with the token for what was dropped at the end."""
    tensors, _ = load(f"prumerge/{name}")
    method, attention = METHODS[name], tensors["cls_attn"][0]
    features, expected = tensors["hidden_states"][:, 1:], tensors["output"][0]
    (seats,), merged = method.merge(view_of(tensors), features)
    found = method.budget == "adaptive"
    kept = adaptive(attention, method.spatial) if found else fixed(attention, method.budget - 1)
    dropped = torch.ones_like(seats)
    dropped[kept] = False
    extra = torch.where(dropped, attention, -1).argmax()
    places = torch.cat([kept, extra[None]])
    assert torch.equal(seats.nonzero().squeeze(-1), places.sort().values)
    torch.testing.assert_close(merged, expected[places.argsort()], rtol=1e-5, atol=1e-6)


@given(st.integers(1, 60), st.integers(0, 60), st.booleans(), st.integers(0, 2**31))
def test_a_fixed_budget_is_spent_to_the_token(cells, budget, spatial, seed):
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(cells, generator=generator)
    kept = fixed(attention, min(budget, cells), spatial)
    assert len(kept.unique()) == len(kept) == min(budget, cells)


@pytest.mark.parametrize("budget", [2, 3, 17, 35, 36, 1 / 36])
@pytest.mark.parametrize("spatial", [False, True])
def test_the_token_for_what_was_dropped_counts(budget, spatial):
    generator = torch.Generator().manual_seed(0)
    view = ImageView(
        Layout(torch.arange(36), 1, 6, 6),
        {"last": torch.rand(1, 1, 36, generator=generator)},
        {"last": torch.randn(1, 36, 4, generator=generator)},
    )
    seats, merged = PruMerge(budget=budget, spatial=spatial).merge(view, torch.randn(1, 36, 8, generator=generator))
    assert int(seats.sum()) == len(merged) == (budget if budget > 1 else 1)


@given(st.integers(2, 80), st.integers(0, 2**31), st.booleans())
def test_whatever_the_attention_something_stays(cells, seed, spatial):
    """Attention without outliers keeps its highest token, where the release keeps none and divides by zero."""
    for attention in (torch.rand(cells, generator=torch.Generator().manual_seed(seed)), torch.full((cells,), 0.1)):
        kept = adaptive(attention, spatial)
        assert 1 <= len(kept.unique()) == len(kept) <= cells
        assert attention[kept[0]] == attention.max()


def test_most_tokens_being_outliers_is_no_division_by_zero():
    """The release's step is 0 there, and it raises; ours is 1."""
    attention = torch.cat([torch.zeros(61), torch.linspace(1, 2, 20)])
    assert len(adaptive(attention)) == 20
    assert len(adaptive(attention, spatial=True)) == 81


def test_an_adaptive_budget_is_prumerge_s_alone():
    from vision_tokens import HiRED

    with pytest.raises(TypeError, match="a budget is a fraction in"):
        HiRED(budget="adaptive")
    with pytest.raises(TypeError, match="a budget is a fraction in"):
        PruMerge(budget="adaptiv")


def test_a_negative_number_of_neighbours_is_refused():
    with pytest.raises(ValueError, match=r"neighbours is at least 0; got -1\. The release's is 32"):
        PruMerge(neighbours=-1)


def test_another_layer_is_refused():
    with pytest.raises(ValueError, match="layer is 'last' or 'feature'; got 'first'"):
        PruMerge(layer="first")
