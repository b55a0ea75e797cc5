"""The metrics of LV-Haystack: the released figures where the release is right, and what the definitions imply."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.video.golden import load_arrays, load_json
from video import metrics
from video.metrics import Agreement, distances, similarities, summary, temporal, visual

TEMPORAL = load_json("lv_haystack_metrics/temporal")
QUESTIONS = list(zip(TEMPORAL["gt_seconds"], TEMPORAL["pred_seconds"], strict=True))
times = st.lists(st.floats(0, 100), min_size=1, max_size=8)


@pytest.mark.parametrize("tolerance", ["1", "3", "5", "10"])
def test_temporal_agreement_is_the_released_one(tolerance):
    expected = TEMPORAL["by_threshold_seconds"][tolerance]
    found = [temporal(annotated, predicted, float(tolerance)) for annotated, predicted in QUESTIONS]
    triples = [[0.0] * 3 if one is None else [one.precision, one.recall, one.f1] for one in found]
    assert triples == expected["per_video"]
    averages = summary(found)
    assert averages.precision.value == pytest.approx(expected["precision"], abs=1e-15)
    assert averages.recall.value == pytest.approx(expected["recall"], abs=1e-15)
    assert averages.f1.value == pytest.approx(expected["f1"], abs=1e-15)
    assert averages.skipped == pytest.approx(1 / len(QUESTIONS)) and averages.recall.low <= averages.recall.high


def test_distances_are_the_released_ones():
    found = [pair for question in QUESTIONS if (pair := distances(*question))]
    assert np.array_equal(found, TEMPORAL["annd"])


def test_ssim_is_the_released_one_with_the_axes_in_the_right_order():
    arrays, expected = load_arrays("lv_haystack_metrics/visual"), load_json("lv_haystack_metrics/visual")
    np.testing.assert_allclose(metrics.window().numpy(), arrays["gauss_kernel_11_1p5"], atol=1e-7)
    found = []
    for number in range(expected["n_videos"]):
        annotated, predicted = arrays[f"v{number}_gt"], arrays[f"v{number}_pred"]
        np.testing.assert_allclose(similarities(annotated, predicted), arrays[f"v{number}_ssim_chw"], atol=2e-6)
        found.append(visual(annotated, predicted))
        assert (found[-1].precision, found[-1].recall) == pytest.approx(expected["chw"]["per_video"][number], abs=2e-6)
    averages = summary(found)
    assert averages.f1_of_means == pytest.approx(expected["chw"]["f1_of_means"], abs=2e-6)
    assert averages.f1.value == pytest.approx(expected["chw"]["mean_of_f1"], abs=2e-6)


@given(times, times, st.floats(0, 20))
def test_precision_and_recall_change_places_with_the_sides(one, other, tolerance):
    here, there = temporal(one, other, tolerance), temporal(other, one, tolerance)
    assert (here.precision, here.recall) == (there.recall, there.precision)
    assert math.isclose(here.f1, there.f1) and 0 <= here.f1 <= 1


@given(times)
def test_what_was_annotated_is_a_perfect_prediction(annotated):
    assert temporal(annotated, annotated, 0) == Agreement(1.0, 1.0)
    assert distances(annotated, annotated) == (0.0, 0.0)


def test_a_picture_is_most_similar_to_itself():
    pictures = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
    table = similarities(pictures, pictures)
    np.testing.assert_allclose(np.diag(table), 1, atol=1e-5)
    assert (table.argmax(1) == range(4)).all() and visual(pictures, pictures).f1 == pytest.approx(1, abs=1e-5)


def test_nothing_to_compare_is_no_zero():
    picture = [np.zeros((8, 8, 3), np.uint8)]
    assert temporal([], [1.0]) is temporal([1.0], []) is distances([], [1.0]) is visual([], picture) is None
    with pytest.raises(ValueError, match=r"none of 2 questions has both annotated and predicted frames"):
        summary([None, None])


def test_pictures_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"SSIM compares pictures of one size; got .*8, 8.*8, 9.*same `short`"):
        similarities([np.zeros((8, 8, 3), np.uint8)], [np.zeros((8, 9, 3), np.uint8)])
