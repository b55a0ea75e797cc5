"""HiRED reproduces the released code's selections and the paper's budgets, and keeps its laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from tests.vision_tokens.golden import load
from tests.vision_tokens.tiny import Prompts, build, inputs_for
from vision_tokens import HiRED, ImageView, Layout
from vision_tokens.attention_rows import class_attention
from vision_tokens.families import FAMILIES
from vision_tokens.hired import apportion, keep_best, overlap, proportional, rectangle_sums, split_budget

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
NEXT = ["next_a30_b10", "next_full_image_capped", "next_mixed_b33", "next_square_b20"]


def images_of(tensors):
    """Per image of a golden file: its rows of attention, expected selection and tiles."""
    start = 0
    for size, partitions in zip(tensors["image_sizes"], tensors["num_patches"].tolist(), strict=True):
        rows = slice(start, start + partitions)
        rows_columns = get_anyres_image_grid_shape(size, PINPOINTS, 336)
        start += partitions
        yield rows, (int(rows_columns[0]), int(rows_columns[1]))


def view_of(tensors, rows, tiles):
    partitions = rows.stop - rows.start
    layout = Layout(torch.arange(partitions * 576), partitions, 24, 24, tiles)
    attention = {"first": tensors["top_cls_attn"][rows, :, 1:], "feature": tensors["bottom_cls_attn"][rows, :, 1:]}
    return ImageView(layout, attention)


@pytest.mark.parametrize("name", NEXT)
def test_strips_select_what_the_released_code_selects(name):
    tensors, exact = load(f"hired/{name}")
    method = HiRED(budget=float(exact["token_budget_rate"]), alpha=float(exact["alpha"]), split="strips")
    for rows, tiles in images_of(tensors):
        keep = method.select(view_of(tensors, rows, tiles))
        assert torch.equal(keep, tensors["kept_mask"][rows].bool())


@pytest.mark.parametrize("name", NEXT)
def test_rectangles_give_the_paper_s_budgets_before_remainders_are_handed_out(name):
    tensors, exact = load(f"hired/{name}")
    rate, alpha = float(exact["token_budget_rate"]), float(exact["alpha"])
    for rows, tiles in images_of(tensors):
        expected = tensors["paper_alg1_budgets"][rows]
        first = tensors["top_cls_attn"][rows.start, :, 1:].sum(dim=0)
        total = int((rows.stop - rows.start) * 576 * rate)
        tiled = total - int(expected[0])
        assert torch.equal(proportional(rectangle_sums(first, tiles, (24, 24)), tiled), expected[1:])
        ours = split_budget(first, torch.full((len(expected),), 576), total, alpha, tiles, (24, 24))
        assert int(ours.sum()) == total
        assert ((ours - expected >= 0) & (ours - expected <= len(expected))).all()


@pytest.mark.parametrize("name", NEXT)
def test_the_selection_is_packed_as_the_corrected_layout_packs_it(name):
    """Un-padding and the order across tiles, through the family's own packing; newline tokens aside."""
    tensors, _ = load(f"hired/{name}")
    starts = [0, *tensors["fixed_layout_lens"].cumsum(0).tolist()]
    for index, (rows, _) in enumerate(images_of(tensors)):
        layout = next_layout(tensors["image_sizes"][index], rows.stop - rows.start)
        kept = layout.source[layout.tokens_of(tensors["kept_mask"][rows].bool())]
        expected = tensors["fixed_layout_token_ids"][starts[index] : starts[index + 1]]
        assert torch.equal(kept[kept >= 0], expected)


def next_layout(size, partitions):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, hidden_size=8, num_hidden_layers=1,
                                       intermediate_size=8, num_attention_heads=1),
        text_config=LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                                vocab_size=8),
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    inputs = {"pixel_values": torch.zeros(1, partitions, 1), "image_sizes": size[None]}
    ((layout, _),) = FAMILIES["llava_next"].image.layouts(LlavaNextModel(config), inputs)
    return layout


def test_one_tile_selects_what_the_released_code_selects():
    tensors, exact = load("hired/llava15_b20")
    view = ImageView(Layout(torch.arange(576), 1, 24, 24), {"feature": tensors["bottom_cls_attn"][..., 1:]})
    keep = HiRED(budget=float(exact["token_budget_rate"])).select(view)[0]
    assert torch.equal(keep.nonzero().squeeze(-1), tensors["kept_indices"])
    assert torch.equal(keep, tensors["kept_mask"].bool())


def test_class_attention_is_the_released_code_s():
    tensors, _ = load("hired/cls_attention_from_qk")
    heads = int(tensors["num_heads"])
    query, key = (tensors[name].unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("q_proj_out", "k_proj_out"))
    rows = class_attention(query, key, query.shape[-1] ** -0.5)
    torch.testing.assert_close(rows, tensors["cls_attn"][..., 1:], rtol=1e-5, atol=1e-7)


@given(
    scores=st.lists(st.floats(0, 1e3), min_size=1, max_size=9),
    capacity=st.lists(st.integers(0, 50), min_size=9, max_size=9),
    total=st.integers(0, 500),
)
def test_apportioned_budgets_fit_and_hand_out_everything(scores, capacity, total):
    limits = torch.tensor(capacity[: len(scores)])
    kept = apportion(torch.tensor(scores), total, limits)
    assert (kept >= 0).all() and (kept <= limits).all()
    assert int(kept.sum()) == min(total, int(limits.sum()))


@given(st.integers(1, 64), st.integers(0, 64), st.integers(0, 2**31))
def test_every_kept_token_scores_at_least_every_dropped_one(cells, budget, seed):
    scores = torch.rand(1, cells, generator=torch.Generator().manual_seed(seed))
    keep = keep_best(scores, torch.tensor([budget]))
    assert int(keep.sum()) == min(budget, cells)
    if 0 < int(keep.sum()) < cells:
        assert scores[keep].min() >= scores[~keep].max()


@given(st.integers(1, 8), st.integers(1, 30))
def test_tiles_share_every_cell_exactly_once(parts, cells):
    torch.testing.assert_close(overlap(parts, cells).sum(dim=0), torch.ones(cells))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 40, 100, 179, 180])
def test_the_budget_is_spent_to_the_token(alpha, total):
    view = random_view()
    keep = HiRED(budget=total if total > 1 else 1 / 180, alpha=alpha).select(view)
    assert int(keep.sum()) == total


def test_the_released_code_leaves_part_of_its_budget_unused_and_we_say_so():
    first = torch.rand(36, generator=torch.Generator().manual_seed(3))
    capacity = torch.full((5,), 36)
    strips = split_budget(first, capacity, 61, 0.5, (2, 2), (6, 6), "strips")
    ours = split_budget(first, capacity, 61, 0.5, (2, 2), (6, 6), "rectangles")
    assert int(strips.sum()) < int(ours.sum()) == 61


def test_left_and_right_tiles_get_different_budgets_with_rectangles_only():
    """The defect of the released code: its strips cannot tell left from right."""
    first = torch.zeros(6, 6)
    first[:, :3] = 1.0
    capacity = torch.full((5,), 36)
    ours = split_budget(first.flatten(), capacity, 60, 0.5, (2, 2), (6, 6))
    assert ours.tolist() == [30, 15, 0, 15, 0]
    strips = split_budget(first.flatten(), capacity, 60, 0.5, (2, 2), (6, 6), "strips")
    assert strips[1:].max() < 15


def test_strips_refuse_a_grid_that_they_cannot_cut():
    with pytest.raises(ValueError, match=r"divides the 36 tokens.*got 5 tiles.*split='rectangles' works"):
        split_budget(torch.rand(36), torch.full((6,), 36), 60, 0.5, (5, 1), (6, 6), "strips")


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha.*lies in \[0, 1\]; got"):
        HiRED(alpha=alpha)


def test_tiles_in_the_padding_get_no_budget():
    """An image of odd shape: what un-padding throws away is never selected, and the budget is spent on the rest."""
    model = build("llava_next")
    inputs = inputs_for("llava_next", Prompts((((40, 90),),)), model)
    import mmaccel
    from vision_tokens.laws import generated

    with mmaccel.applied(model, HiRED(budget=0.5)) as run:
        generated(model, inputs, 1)
        (layout,), (cells,) = run.report.details["layouts"], run.report.details["cells"]
        assert not (cells & ~layout.valid()).any()
        assert int(cells.sum()) == int(0.5 * int(layout.valid().sum()))


def random_view():
    generator = torch.Generator().manual_seed(0)
    attention = {name: torch.rand(5, 4, 36, generator=generator) for name in ("first", "feature")}
    return ImageView(Layout(torch.arange(180), 5, 6, 6, (2, 2)), attention)
