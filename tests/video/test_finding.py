"""A search, a detector and a real file together: what is found, what it cost, and what goes wrong."""

from __future__ import annotations

import numpy as np
import pytest

import video.film
from mmaccel.pocket import world
from tests.video.films import cut, film, number_of, steady
from video.colour_shape import ColourShape
from video.dense import AKS, BOLT, DenseRetrieval, Uniform
from video.detectors import Detections
from video.film import Film
from video.finding import find_keyframes, most_frames
from video.pocket_haystack import make
from video.tstar import TStar


class Watched:
    """A detector that keeps what it was shown."""

    def __init__(self, whole=False):
        self.detector, self.shown, self.whole_pictures = ColourShape(), [], whole

    def __call__(self, pictures, phrases):
        self.shown += [picture.shape for picture in pictures]
        return self.detector(pictures, phrases)


def things_in(haystack, time):
    """The names that the generator says are in view."""
    stays = {stay for event in haystack.events for stay in (event.target, event.cue) if stay}
    return {stay.name for stay in stays if stay.begin <= time < stay.end - 0.3}


def test_every_event_is_found_verified_and_shown(haystack):
    with Film(haystack.path) as film:
        for event in haystack.events:
            cues = [event.cue.name] if event.cue else []
            found = find_keyframes(film, "tstar", "colour-shape", [event.target.name], cues, frames=4)
            assert event.target.begin - 0.2 <= found.verified[event.target.name] < event.target.end
            assert np.abs(found.times - event.centre).min() <= 5 and (np.diff(found.times) > 0).all()
            assert np.nanargmax(found.curve) in range(int(event.target.begin), int(event.target.end) + 1)


def test_the_ledger_is_what_an_outside_counter_saw(haystack):
    event = haystack.events[0]
    for search, whole in ((TStar(), False), (TStar(), True), (DenseRetrieval(), False)):
        detector = Watched(whole)
        with Film(haystack.path) as film:
            found = find_keyframes(film, search, detector, [event.target.name], frames=4, budget=1.0)
        spent = found.ledger.spent
        grids = [shape for shape in detector.shown if shape == (4 * 96, 4 * 96, 3)]
        single = len(detector.shown) - len(grids)
        assert spent["detector_calls"] == len(detector.shown) and bool(grids) == (search == TStar() and not whole)
        assert spent["frames"] == single + sum(
            np.isfinite(table).sum() for (_, way, _, _), table in film.seen.items() if way == "cell"
        )
        assert set(found.ledger.seconds) == {"frames", "detector_calls", "keyframes"}


@pytest.mark.parametrize("search", [TStar(), TStar(proposal="spline"), DenseRetrieval(), AKS(), BOLT(), Uniform()])
@pytest.mark.parametrize("budget", [8, 20, 0.3, 1.0])
def test_no_search_overruns_its_budget(haystack, search, budget):
    with Film(haystack.path) as film:
        found = find_keyframes(film, search, ColourShape(), ["red thing", "circle"], frames=8, budget=budget)
        assert found.ledger.spent.get("frames", 0) <= most_frames(budget, 120)
        assert len(found.times) == 8


def test_a_second_question_pays_only_for_what_is_new(haystack):
    event = haystack.events[0]
    with Film(haystack.path) as film:
        first = find_keyframes(film, TStar(), ColourShape(), [event.target.name])
        decoded = film.reader.decoded
        again = find_keyframes(film, TStar(), ColourShape(), [event.target.name])
        assert again.times.tolist() == first.times.tolist() and "frames" not in again.ledger.spent
        other = find_keyframes(film, TStar(), ColourShape(), [haystack.events[1].target.name])
        assert other.ledger.spent["frames"] > 0 and film.reader.decoded > decoded


@pytest.mark.parametrize("slots", [0, 1, 10])
def test_the_small_pictures_that_are_kept_are_bounded(haystack, monkeypatch, slots):
    with Film(haystack.path) as film:
        size = film.pictures([0.0])[0].nbytes
    monkeypatch.setattr(video.film, "MEMORY", slots * size)
    with Film(haystack.path) as film:
        before = [picture.copy() for picture in film.pictures(np.arange(30.0).tolist())]
        decoded = film.reader.decoded
        assert film._kept.nbytes == slots * size
        again = film.pictures([29.0, 0.0, 5.0, 29.0, 28.0])
        assert all(np.array_equal(again[place], before[time]) for place, time in enumerate((29, 0, 5, 29, 28)))
        if slots == 10:  # 0 and 5 took the places of 20 and 21
            again, decoded = film.pictures([0.0, 22.0, 28.0]), film.reader.decoded
            film.pictures([0.0, 5.0, 22.0, 29.0])
            assert film.reader.decoded == decoded
            assert all(np.array_equal(again[place], before[time]) for place, time in enumerate((0, 22, 28)))
        assert film._kept.nbytes == slots * size and film.reader.decoded > 0


def test_many_targets_are_all_verified(haystack):
    names = [event.target.name for event in haystack.events[:2]]
    with Film(haystack.path) as film:
        found = find_keyframes(film, TStar(), ColourShape(), [*names, names[0]], budget=1.0)
    assert set(found.verified) == set(names)


def test_a_clip_of_a_few_seconds_gives_closer_frames(tmp_path):
    with Film(film(tmp_path / "clip.mp4", steady(60))) as clip:
        found = find_keyframes(clip, Uniform(), ColourShape(), [], frames=6)
        assert [number_of(picture) for picture in found.frames.pictures] == [0, 10, 20, 30, 40, 50]
        assert find_keyframes(clip, TStar(), ColourShape(), ["red circle"], frames=6, budget=1.0).verified == {}


def test_more_frames_than_the_video_has_are_refused_with_their_number(tmp_path):
    path = film(tmp_path / "clip.mp4", steady(5))
    with Film(path) as clip, pytest.raises(ValueError, match=r"9 frames were asked for, .* it has 5 .*frames=5"):
        find_keyframes(clip, Uniform(), ColourShape(), [], frames=9)


def test_a_truncated_file_is_searched_as_far_as_it_goes_and_says_so(tmp_path, haystack):
    mkv = make(tmp_path / "haystack.mkv", 60, seed=3, events=2, cue_seconds=20)
    event = mkv.events[0]
    with Film(cut(mkv.path, 0.6)) as film:
        found = find_keyframes(film, TStar(), ColourShape(), [event.target.name], frames=4, budget=1.0)
    assert found.verified and "the file is cut short: its header says 60.0 s" in found.notes[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 0}, r"at least one frame is to be chosen; got frames=0"),
        ({"targets": []}, r'tstar looks for something, and no targets were given.*targets=\["red triangle"\]'),
        ({"budget": 1}, r"a share of the video's seconds in \(0, 1\], or a number of frames from 2 up; got 1$"),
        ({"budget": 1.5}, r"got 1.5"),
        ({"targets": ["dog"]}, r"colour-shape cannot read 'dog'"),
        ({"search": "t-star"}, r"did you mean 'tstar'"),
    ],
)
def test_wrong_questions_are_refused(haystack, settings, message):
    given = {"search": TStar(), "targets": ["red circle"], **settings}
    targets, search = given.pop("targets"), given.pop("search")
    with Film(haystack.path) as film, pytest.raises(ValueError, match=message):
        find_keyframes(film, search, ColourShape(), targets, **given)


def test_pictures_of_no_size_are_refused(haystack):
    with pytest.raises(ValueError, match=r"at least one pixel a side; got short=0"):
        Film(haystack.path, short=0)


def test_a_callable_is_a_detector(haystack):
    def bright(pictures, phrases):
        return [Detections([[0, 0, 9, 9]], np.array([0]), [picture.mean() / 255]) for picture in pictures]

    with Film(haystack.path) as film:
        found = find_keyframes(film, DenseRetrieval(), bright, ["brightness"], frames=3, budget=1.0)
        means = [picture.mean() for picture in film.pictures(found.seconds.tolist())]
    assert found.times.tolist() == sorted(np.argsort(-np.array(means), kind="stable")[:3].tolist())


def test_the_haystack_is_what_it_says_and_the_same_every_time(tmp_path, haystack):
    again = make(tmp_path / "again.mp4", 120, seed=0, events=4, cue_seconds=30)
    assert again.events == haystack.events and again.path.read_bytes() == haystack.path.read_bytes()
    names = [event.target.name for event in haystack.events]
    assert len(set(names)) == 4 and sum(event.cue is not None for event in haystack.events) == 2
    with Film(haystack.path) as film:
        assert film.reader.duration == pytest.approx(120)
        for event in haystack.events:
            assert 6 <= event.target.end - event.target.begin <= 15
            (picture,) = film.frames([event.centre]).pictures
            seen = {thing.name: thing for thing in world.parse(picture).things}
            assert things_in(haystack, event.centre) <= set(seen)
            assert seen[event.target.name].region == event.answer in world.REGIONS
            assert event.question == f"where is the {event.target.name}?"
            for other in haystack.events:
                if other is not event:
                    assert event.target.name not in {
                        t.name for t in world.parse(film.frames([other.centre]).pictures[0]).things
                    }


@pytest.mark.parametrize(("seconds", "events"), [(60, 11), (60, 0), (30, 3)])
def test_haystacks_that_do_not_fit_are_refused(tmp_path, seconds, events):
    with pytest.raises(ValueError, match=rf"1 to 10 events that fit into it; got {events} of up to 15.0 s"):
        make(tmp_path / "none.mp4", seconds, events=events)


def test_a_longer_haystack_with_longer_events_is_the_same_one_stretched():
    short = make("none.mp4", 100, seed=4, events=3, write=False)
    long = make("none.mp4", 1000, seed=4, events=3, event_seconds=(60.0, 150.0), cue_seconds=600.0, write=False)
    for one, other in zip(short.events, long.events, strict=True):
        assert one.target.name == other.target.name and one.answer == other.answer
        assert other.target.begin == pytest.approx(10 * one.target.begin)
        assert other.target.end == pytest.approx(10 * one.target.end)
