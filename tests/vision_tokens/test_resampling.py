"""Fourier-VLM and pooling: the released values, the transform's laws, and where the small grid sits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmaccel
from mmaccel.budgets import kept_count
from tests.vision_tokens.golden import load
from tests.vision_tokens.tiny import Prompts, build, inputs_for
from vision_tokens import FourierVLM, Layout, PooledTokens
from vision_tokens.fourier_vlm import dct_matrix, low_frequencies
from vision_tokens.language_input import evenly_spread, grid_within
from vision_tokens.laws import kept_prompt

FILES = ["llava_24_to_12_fp16", "odd_9x7_to_4x3", "qwen_11x17_two_thirds_bf16"]
DTYPES = {"torch.float16": torch.float16, "torch.bfloat16": torch.bfloat16}


def golden(name):
    tensors, exact = load(f"fourier_vlm/{name}")
    height, width, small_height, small_width = tensors["grid_hw_reserve_hw"].tolist()
    grid = tensors["x"].unflatten(1, (height, width))
    return tensors, grid, (small_height, small_width), DTYPES[exact["input_dtype"]]


@pytest.mark.parametrize("name", FILES)
def test_float32_values_are_the_released_code_s(name):
    tensors, grid, size, _ = golden(name)
    for gain, expected in (("paper", "y_ortho_fp32"), ("mean-preserving", "y_mean_preserving_fp32")):
        ours = low_frequencies(grid, size, gain).flatten(1, 2)
        torch.testing.assert_close(ours, tensors[expected], rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("name", FILES)
def test_half_precision_values_are_within_one_unit_in_the_last_place(name):
    tensors, grid, size, dtype = golden(name)
    ours = low_frequencies(grid.to(dtype), size, "paper").flatten(1, 2)
    expected = tensors["y_ortho_lowp"].to(dtype)
    steps = (ours.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert ours.dtype == dtype
    near_zero = expected.float().abs() < 1e-4  # the float32 sums differ by 4e-6, which is many steps of a tiny number
    assert steps[~near_zero].max() <= 1
    torch.testing.assert_close(ours[near_zero].float(), expected[near_zero].float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_the_coefficients_are_the_orthonormal_dct(name):
    tensors, grid, _, _ = golden(name)
    rows, columns = dct_matrix(grid.shape[1]), dct_matrix(grid.shape[2])
    coefficients = torch.einsum("kh,bhwc,lw->bckl", rows, grid.double(), columns)
    torch.testing.assert_close(coefficients.float(), tensors["coefficients"], rtol=1e-5, atol=1e-5)


@given(st.integers(1, 32))
def test_the_dct_is_orthonormal(length):
    matrix = dct_matrix(length)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(length, dtype=torch.float64), rtol=0, atol=1e-12)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_a_constant_grid_stays_constant(height, width, small_height, small_width):
    size = (min(small_height, height), min(small_width, width))
    out = low_frequencies(torch.full((1, height, width, 2), 3.0), size)
    torch.testing.assert_close(out, torch.full((1, *size, 2), 3.0), rtol=1e-5, atol=1e-5)


def test_a_signal_below_the_cut_off_is_only_resampled():
    """A cosine that the small grid can carry comes out as the same cosine, sampled at the small grid's places."""
    fine, coarse = ((torch.arange(n) + 0.5) / n for n in (24, 12))
    wave = torch.cos(torch.pi * 5 * fine)[None, :, None, None].expand(1, 24, 24, 1)
    expected = torch.cos(torch.pi * 5 * coarse)[None, :, None, None].expand(1, 12, 12, 1)
    torch.testing.assert_close(low_frequencies(wave, (12, 12)), expected, rtol=0, atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 1.0))
def test_the_small_grid_fits_the_budget_and_the_grid(height, width, fraction):
    count = kept_count(fraction, height * width)
    rows, columns = grid_within(count, (height, width))
    assert 1 <= rows <= height and 1 <= columns <= width and rows * columns <= count
    seats = evenly_spread((rows, columns), (height, width))
    assert len(seats.unique()) == rows * columns and (seats.diff() > 0).all()


@pytest.mark.parametrize(
    ("count", "expected"), [(144, (12, 12)), (64, (8, 8)), (36, (6, 6)), (115, (11, 10)), (1, (1, 1))]
)
def test_the_paper_s_sizes_come_out(count, expected):
    assert sorted(grid_within(count, (24, 24))) == sorted(expected)


def test_a_count_is_shared_by_the_tiles():
    assert FourierVLM(budget=720).size_for(Layout(torch.arange(2880), 5, 24, 24, (2, 2))) == (12, 12)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("method", [FourierVLM(budget=0.3), PooledTokens(budget=0.3)], ids=lambda m: m.name)
def test_llava_reads_the_projected_low_frequencies(family, method):
    """By hand: the tower's features, resampled, through the projector, on their seats."""
    model = build(family)
    inputs = inputs_for(family, Prompts(), model)
    body, pixels = model.model, inputs["pixel_values"].flatten(0, -4)
    with torch.no_grad():
        features = body.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        small = method.resample(features.unflatten(1, (6, 6)), (3, 3))
        expected = body.multi_modal_projector(small.flatten(1, 2))
        with mmaccel.applied(model, method):
            prompt = kept_prompt(model, inputs)
    visual = (inputs["input_ids"] == 99) & prompt.keep
    newline = getattr(body, "image_newline", None)
    kept = prompt.embeddings[visual]
    if newline is not None:
        kept = kept[~(kept == newline).all(dim=-1)]
    whole = expected[0]
    torch.testing.assert_close(kept[: len(whole)], whole, rtol=1e-5, atol=1e-6)
    for vector in kept:
        assert (expected.flatten(0, 1) - vector).abs().amax(dim=-1).min() < 1e-5


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "idefics3"])
def test_other_families_read_the_resampled_features(family):
    model = build(family)
    inputs = inputs_for(family, Prompts(), model)
    method = FourierVLM(budget=0.4)
    dense = model.model.get_image_features(
        **{k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}, return_dict=True
    ).pooler_output[0]
    grid = (6, 4) if family == "qwen2_5_vl" else (3, 3)
    size = grid_within(kept_count(0.4, len(dense)), grid)
    expected = method.resample(dense.unflatten(0, grid)[None], size)[0].flatten(0, 1)
    with mmaccel.applied(model, method):
        prompt = kept_prompt(model, inputs)
    kept = prompt.embeddings[(inputs["input_ids"] == 99) & prompt.keep]
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-6)
