"""The peers: AKS and BOLT index for index, and what every search keeps to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.video.golden import load_json
from tests.video.tables import Table
from video.dense import AKS, BOLT, DenseRetrieval, Uniform, adaptive_segments, filled, from_segments, inverse_transform
from video.search import FrameSearch
from video.tstar import TStar

SEARCHES = (Uniform(), DenseRetrieval(), AKS(), BOLT(), TStar())


@pytest.mark.parametrize("case", load_json("keyframe_peers/aks"))
def test_aks_is_the_released_one(case):
    scores, numbers = np.array(case["scores"]), np.array(case["frame_numbers"])
    parts = adaptive_segments(scores, case["max_num_frames"], case["t1"], case["t2"], case["max_depth"])
    told = [{"depth": depth, "length": length, "first": int(numbers[begin])} for depth, length, begin in parts]
    assert told == case["segments"]
    assert numbers[from_segments(scores, parts, case["max_num_frames"])].tolist() == case["selected"]


@pytest.mark.parametrize("case", load_json("keyframe_peers/bolt_its"))
def test_inverse_transform_sampling_is_the_released_one(case):
    power = 1 if case["power"] == -1 else case["power"]  # -1 says "none" there
    assert inverse_transform(np.array(case["scores"]), case["n"], power).tolist() == case["selected"]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: search.name)
@given(total=st.integers(1, 120), seed=st.integers(0, 99), kind=st.sampled_from(["random", "flat", "one"]))
def test_every_search_gives_exactly_as_many_different_frames_as_asked(search, total, seed, kind):
    rng = np.random.default_rng(seed)
    scores = {"random": rng.random(total), "flat": np.full(total, 0.3), "one": np.eye(total)[seed % total]}[kind]
    count = min(8, total)
    found = search.search(Table(scores[:, None]), count)
    assert len(found.positions) == count and (np.diff(found.positions) > 0).all()
    assert found.positions.min() >= 0 and found.positions.max() < total and len(found.scores) == total


@pytest.mark.parametrize("search", [DenseRetrieval(), AKS(), BOLT()], ids=lambda search: search.name)
def test_dense_searches_look_evenly_at_what_the_budget_allows(search):
    haystack = Table(np.random.default_rng(0).random((100, 1)), budget=20)
    found = search.search(haystack, 8)
    assert len(haystack.verified) == 20 and haystack.left == 0 and set(np.diff(haystack.verified)) == {5}
    assert set(found.positions) <= set(haystack.verified)
    assert np.isnan(found.scores).sum() == 80
    with pytest.raises(ValueError, match=rf"{search.name} chooses among .* allows 3; 8 frames need at least as many"):
        search.search(Table(np.zeros((100, 1)), budget=3), 8)


def test_uniform_looks_at_nothing():
    haystack = Table(np.zeros((80, 1)), budget=1)
    assert Uniform().search(haystack, 8).positions.tolist() == list(range(5, 80, 10)) and haystack.left == 1


def test_repetitions_are_replaced_by_the_best_of_the_rest():
    assert filled(np.array([4, 4, 4]), np.array([0.1, 0.9, 0.2, 0.9, 0.5]), 3).tolist() == [1, 3, 4]


@pytest.mark.parametrize("search", [*SEARCHES, TStar(rows=8, proposal="spline"), AKS(depth=3)])
def test_a_search_survives_its_dictionary(search):
    assert type(search).from_dict(search.to_dict()) == search and isinstance(search, FrameSearch)
    assert search.summary().endswith(".")
