"""Odd pictures: tiles, windows, empty slots, masked pixels; and numbers that rank nothing."""

import pytest
import torch

import mmaccel
from tests.vision_tokens.product import holds
from tests.vision_tokens.saliency import eager_weights, watched
from tests.vision_tokens.test_families import METHODS, works
from tests.vision_tokens.tiny import PINPOINTS, Prompts, build, inputs_for
from vision_tokens import HiRED, ImageView, Layout
from vision_tokens.families import find_host
from vision_tokens.laws import generated, kept_prompt

METHOD = HiRED(budget=0.25)
ONE = Prompts()


def on(family):
    """The methods that work on a family."""
    return [method for method in METHODS if works(method, family)]


def test_a_flat_stack_of_tiles_is_read_as_the_padded_one():
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    model = build("llava_next")
    inputs = inputs_for("llava_next", Prompts((((96, 70), (48, 144)),), (7,)), model)
    tiles = [image_size_to_num_patches(size.tolist(), PINPOINTS, 48) for size in inputs["image_sizes"]]
    assert len(set(tiles)) == 2
    flat = torch.cat([pixels[:count] for pixels, count in zip(inputs["pixel_values"], tiles, strict=True)])
    for method in on("llava_next"):
        with mmaccel.applied(model, method):
            padded = generated(model, inputs, 2)[1]
            assert torch.equal(generated(model, {**inputs, "pixel_values": flat}, 2)[1], padded)


@pytest.mark.parametrize(
    ("size", "tiles", "rows", "columns"),
    [
        ((48, 144), (1, 3), range(6), range(18)),
        ((24, 144), (1, 3), range(1, 5), range(18)),  # un-padded: a row of cells goes above, one below
        ((144, 48), (3, 1), range(18), range(6)),
        ((144, 24), (3, 1), range(18), range(1, 5)),
    ],
)
@pytest.mark.parametrize("method", on("llava_next"), ids=lambda method: method.name)
def test_newline_tokens_of_long_images_stay_with_their_rows(method, size, tiles, rows, columns):
    """By hand: the whole image's 36 tokens, then row by row over the plane of tiles, a newline token behind each."""
    model = build("llava_next")
    inputs = inputs_for("llava_next", Prompts(((size,),)), model)
    with mmaccel.applied(model, method) as run:
        generated(model, inputs, 1)
        (layout,), (cells,) = run.report.details["layouts"], run.report.details["cells"]
        kept = kept_prompt(model, inputs).keep[inputs["input_ids"] == 99]
    assert layout.tiles == tiles
    expected = cells[0].tolist()
    for row in rows:
        line = [bool(cells[1 + row // 6 * tiles[1] + column // 6, row % 6 * 6 + column % 6]) for column in columns]
        expected += [*line, any(line)]
    assert kept.tolist() == expected
    assert 0 < sum(expected) < len(expected)
    holds(model, method, inputs)


def test_saliency_behind_window_attention_is_that_of_the_tokens_in_reading_order(monkeypatch):
    """Qwen2.5-VL, images of different grids, none a multiple of the window: by hand from the full matrices."""
    model = build("qwen2_5_vl", "eager")
    inputs = inputs_for("qwen2_5_vl", Prompts((((96, 80), (48, 112), (80, 48)),), (7,)), model)
    views = watched(model, inputs)
    matrices = eager_weights(model, find_host(model).attention_modules[3], inputs, monkeypatch)
    assert len(matrices) == len(views) == 3
    for view, matrix in zip(views, matrices, strict=True):
        height, width, side = view.layout.height, view.layout.width, 2  # a window has 2 x 2 merged tokens
        order = [
            (top + i) * width + left + j
            for top in range(0, height, side) for left in range(0, width, side)
            for i in range(min(side, height - top)) for j in range(min(side, width - left))
        ]  # fmt: skip
        assert order != sorted(order)
        by_hand = torch.zeros(4, height * width)
        for place, token in enumerate(order):
            by_hand[:, token] = matrix[0, :, :, 4 * place : 4 * place + 4].mean(dim=1).mean(dim=-1)
        torch.testing.assert_close(view.attention["feature"][0], by_hand, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_empty_picture_slots_and_masked_pixels_are_respected(family, monkeypatch):
    model = build(family, "eager")
    inputs = inputs_for(family, Prompts((((48, 48), (48, 48)), ((48, 48),)), (7, 9)), model)
    inputs["pixel_values"][1] = inputs["pixel_values"][1].flip(0)  # the empty slot of the second row comes first
    mask = torch.ones(2, 2, 48, 48, dtype=torch.long)
    mask[0, 1, :, 32:] = 0  # two of six columns of patches, one of three columns of tokens
    inputs["pixel_attention_mask"] = mask
    views = watched(model, inputs)
    (matrix,) = eager_weights(model, find_host(model).attention_modules[-1], inputs, monkeypatch)
    assert len(views) == len(matrix) == 3
    for view, weights in zip(views, matrix, strict=True):
        patches = weights.mean(dim=1).view(4, 3, 2, 3, 2)
        by_hand = patches.mean(dim=(2, 4)).flatten(1)
        torch.testing.assert_close(view.attention["feature"][0], by_hand, rtol=1e-5, atol=1e-7)
    assert (views[1].attention["feature"].view(4, 3, 3)[..., 2] == 0).all()
    for method in on(family):
        if method.name != "tome":  # refuses masked patches: see test_tome
            holds(model, method, inputs)


def test_a_picture_of_zeros_alone_is_a_picture_to_smolvlm():
    model = build("smolvlm")
    inputs = inputs_for("smolvlm", ONE, model)
    holds(model, METHOD, {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])})


def test_attention_that_holds_nan_is_refused():
    model, inputs = build("llava_next"), inputs_for("llava_next", ONE, build("llava_next"))
    pixels = inputs["pixel_values"].clone()
    pixels[0, 0, 0, 0, 0] = torch.nan
    with mmaccel.applied(model, METHOD):
        with pytest.raises(
            ValueError, match=r"attention holds NaN, so hired cannot rank tokens; look for NaN in pixel"
        ):
            model(**{**inputs, "pixel_values": pixels})
        assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize("score", [torch.nan, torch.inf])
def test_a_budget_is_not_shared_by_scores_that_are_no_numbers(score):
    from vision_tokens.hired import apportion

    with pytest.raises(ValueError, match=r"in proportion to finite scores only; got \["):
        apportion(torch.tensor([1.0, score]), 5, torch.tensor([4, 4]))


def test_of_equal_scores_the_earlier_is_kept():
    view = ImageView(Layout(torch.arange(36), 1, 6, 6), {"feature": torch.full((1, 4, 36), 0.1)})
    assert HiRED(budget=9).select(view)[0].nonzero().flatten().tolist() == list(range(9))
    tiled = ImageView(
        Layout(torch.arange(180), 5, 6, 6, (2, 2)),
        {name: torch.full((5, 4, 36), 0.1) for name in ("first", "feature")},
    )
    assert HiRED(budget=72).select(tiled).sum(dim=-1).tolist() == [36, 9, 9, 9, 9]
