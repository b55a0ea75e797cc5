"""T*: the released numbers from the functions that the method runs, and what the mended parts promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.video.golden import load_arrays, load_json
from tests.video.tables import Table
from video.search import Chosen
from video.tstar import (
    START,
    TStar,
    draw_probabilities,
    first_positions,
    select,
    spline_distribution,
    spread_scores,
    widest_gaps,
)

UNITS = load_arrays("tstar/units")
RUNS = ("search_4x4_first_iter", "search_4x4_two_targets", "search_8x8_miss")


@pytest.mark.parametrize("case", [0, 1, 2])
def test_spreading_is_the_released_one(case):
    names = (f"spread{case}_{part}" for part in ("score_in", "sampled", "conf", "score_out"))
    scores, sampled, cells, expected = (UNITS[name] for name in names)
    assert np.array_equal(spread_scores(scores, sampled, cells, 5), expected)


@pytest.mark.parametrize("case", ["0", "1", "2", "K"])
def test_the_spline_is_the_released_one(case):
    scores = UNITS["splineK_score" if case == "K" else f"spread{case}_score_out"]
    found = spline_distribution(scores, UNITS[f"spline{case}_nonvisited"] == 0)
    np.testing.assert_allclose(found, UNITS[f"spline{case}_P"], rtol=1e-12)


@pytest.mark.parametrize("name", RUNS)
def test_a_released_search_is_repeated_look_by_look(name):
    facts, expected = load_json(f"tstar/{name}"), load_arrays(f"tstar/{name}")
    phrases = facts["targets"] + facts["cues"]

    def table(detections):
        filled = np.zeros((facts["n_seconds"], len(phrases)))
        for second, found in detections.items():
            for phrase, confidence in found:
                filled[int(second), phrase] = max(filled[int(second), phrase], confidence)
        return filled

    rows, columns = facts["grid"]
    cells = rows * columns
    haystack = Table(
        table(facts["grid_detections"]),
        table(facts["verify_detections"]),
        targets=len(facts["targets"]),
        budget=-(-int(facts["budget_frames"]) // cells) * cells,  # the release's last grid overruns its budget
        frames_are_free=True,
    )
    released = TStar(
        rows=rows, columns=columns, threshold=facts["confidence_threshold"], proposal="spline", verification="any",
        selection="draw", seed=facts["seed"],
    )  # fmt: skip
    rng, found = np.random.RandomState(facts["seed"]), Chosen(np.empty(0, int), np.full(facts["n_seconds"], START))
    rounds = list(released.rounds(haystack, found, rng))
    assert np.array_equal([one.sampled for one in rounds], expected["sampled"])
    assert len(rounds) == facts["iterations"]
    if "sample_prob" in expected:
        np.testing.assert_allclose([one.probabilities for one in rounds[1:]], expected["sample_prob"], rtol=1e-10)
    np.testing.assert_allclose([one.distribution for one in rounds], expected["P_after"], rtol=1e-10)
    np.testing.assert_allclose([one.scores for one in rounds], expected["score_after"], rtol=1e-12)
    np.testing.assert_allclose(found.scores, expected["final_score"], rtol=1e-12)
    remaining = [target for number, target in enumerate(facts["targets"]) if number not in found.verified]
    assert remaining == facts["remaining_targets"]
    assert set(haystack.verified) == set(expected["verified_secs"].tolist())
    drawn = select(found.scores, facts["k"], rng)
    assert np.array_equal(drawn, expected["keyframe_secs"])
    again = released.search(Table(haystack.in_cells, haystack.alone, targets=haystack.targets,
                                  budget=haystack.budget, frames_are_free=True), facts["k"])  # fmt: skip
    assert np.array_equal(again.positions, drawn)


def event(total, begin, length, confidence=0.8):
    """One target that is seen, in cells as well as alone, for `length` positions."""
    table = np.zeros((total, 1))
    table[begin : begin + length] = confidence
    return table


@given(total=st.integers(1, 400), data=st.data())
def test_an_event_longer_than_the_gaps_is_found_and_shown(total, data):
    length = data.draw(st.integers(1, total))
    begin = data.draw(st.integers(0, total - length))
    haystack = Table(event(total, begin, length))
    found = TStar().search(haystack, min(8, total))
    assert begin <= found.verified[0] < begin + length and found.verified[0] in found.positions
    assert len(set(haystack.looked)) == len(haystack.looked), "nothing is looked at twice"
    assert len(haystack.looked) <= 16 + max(16, 4 * total / length)


@given(st.integers(1, 300), st.integers(1, 60), st.integers(0, 99))
def test_the_budget_is_never_overrun_and_the_frames_are_as_many_as_asked(total, budget, seed):
    rng = np.random.default_rng(seed)
    cells = np.where(rng.random((total, 3)) < 0.3, rng.random((total, 3)), 0)
    for search in (TStar(), TStar(proposal="spline"), TStar(selection="draw", verification="any")):
        haystack = Table(cells, cells * 0.5, targets=2, budget=budget)
        found = search.search(haystack, min(8, total))
        assert haystack.left >= 0
        assert len(found.positions) == len(set(found.positions)) == min(8, total)
        assert (np.diff(found.positions) > 0).all()


def test_scaled_events_take_the_same_looks_in_a_longer_video():
    looks = {1: 0, 10: 0}
    for scale in looks:
        for begin in range(5, 590, 31):
            haystack = Table(event(600 * scale, begin * scale, 10 * scale))
            TStar().search(haystack, 8)
            looks[scale] += len(haystack.looked)
    assert looks[10] <= 1.1 * looks[1]


def test_a_cue_draws_the_looks_to_where_it_is():
    cells = np.zeros((3600, 2))
    cells[2000:2120, 1] = 0.8
    cells[2060:2068, 0] = 0.8
    with_cue, without = Table(cells), Table(cells * [1, 0])
    for haystack in (with_cue, without):
        assert 2060 <= TStar().search(haystack, 8).verified[0] < 2068
    assert len(with_cue.looked) * 2 < len(without.looked)


def test_a_strong_cue_verifies_no_weak_target_unless_the_release_is_followed():
    cells, alone = np.array([[0.2, 0.9]] * 20), np.array([[0.3, 1.0]] * 20)
    assert not TStar(threshold=0.4).search(Table(cells, alone, cue=1.0), 4).verified
    assert TStar(threshold=0.4, verification="any").search(Table(cells, alone, cue=1.0), 4).verified


def test_a_find_that_does_not_stand_up_loses_its_score():
    cells = event(160, 40, 1, 0.9)
    found = TStar().search(Table(cells, cells * 0), 4)
    assert not found.verified and found.scores[40] == 0


def test_a_video_shorter_than_a_grid_is_seen_whole():
    haystack = Table(event(5, 3, 1))
    assert TStar().search(haystack, 5).verified == {0: 3}
    assert sorted(haystack.looked) == [0, 1, 2, 3, 4]


def test_nothing_found_is_told_by_no_verified_target():
    found = TStar().search(Table(np.zeros((50, 1))), 3)
    assert found.verified == {} and len(found.positions) == 3


def test_few_visited_positions_make_a_distribution_too():
    for visited in ([], [3], [3, 30, 70]):
        mask = np.isin(np.arange(100), visited)
        found = spline_distribution(np.where(mask, 0.5, START), mask)
        assert found.sum() == pytest.approx(1) and (found > 0).all()
    assert (draw_probabilities(found, np.ones(100, bool), 16) > 0).all()
    assert select(np.zeros(10), 3, np.random.RandomState(0)).tolist() == [0, 1, 2]
    assert first_positions(3, 16).tolist() == [0, 1, 2]


@given(st.integers(2, 200), st.integers(1, 40))
def test_an_even_promise_halves_the_widest_gap(total, count):
    visited = np.arange(total) == 0
    chosen = widest_gaps(np.ones(total), visited, count)
    assert len(chosen) == min(count, total - 1)
    seen = np.sort([0, *chosen])
    gaps = np.diff([*seen, total])
    assert gaps.max() <= max(2, 4 * total / len(seen))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 0}, r"at least one row and one column.*got rows=0, columns=4"),
        ({"spread": -1}, r"spread 0 seconds or more; .*spread=-1"),
        ({"threshold": 1.5}, r"the threshold is a confidence in \[0, 1\); got 1.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TStar(**settings)
