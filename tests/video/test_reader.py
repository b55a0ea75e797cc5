"""The frame that a reader returns for time t is the frame whose interval holds t, whatever the file is like."""

from __future__ import annotations

import threading
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.video import films
from tests.video.films import film, number_of, steady, varying
from video.reader import open_video

BACKENDS = ("pyav", "opencv")
OPEN_GROUPS = {"x264-params": "open-gop=1:bframes=3:b-pyramid=normal", "preset": "fast"}
KINDS = {
    "steady.mp4": (steady(120), {}),
    "varying.mp4": (varying(120), {}),
    "varying.mkv": (varying(120), {}),
    "varying.ts": (varying(120), {}),
    "one-group.mp4": (varying(60), {"group": 1000}),
    "every-frame-a-key.mp4": (steady(60), {"group": 1}),
    "open-groups.mp4": (steady(120), OPEN_GROUPS),
    "mpeg4.avi": (steady(120), {"codec": "mpeg4"}),
    "without-times.h264": (steady(120), {}),
    "times-of-decoding.avi": (steady(120), {}),
    "late.mkv": ([5000 + time for time in steady(60)], {}),
    "one-frame.mp4": ([0], {}),
}
OPENCV = ("steady.mp4", "varying.mp4", "varying.mkv", "open-groups.mp4", "one-frame.mp4")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    for name, (times, options) in KINDS.items():
        film(folder / name, times, **options)
    return folder


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("long") / "film.mp4", varying(200), container={"movflags": "faststart"})


def shown_at(times: list[int], asked: np.ndarray) -> np.ndarray:
    """The numbers of the frames whose intervals hold the asked seconds."""
    starts = (np.array(times) - times[0]) / 1000
    return np.searchsorted(starts, asked + 1e-6, side="right") - 1


@pytest.mark.parametrize(
    ("name", "backend"), [(name, "pyav") for name in KINDS] + [(name, "opencv") for name in OPENCV]
)
def test_the_frame_at_t_is_the_frame_whose_interval_holds_t(shelf, name, backend):
    times = KINDS[name][0]
    starts = (np.array(times) - times[0]) / 1000
    with open_video(shelf / name, backend) as video:
        rng = np.random.default_rng(0)
        asked = np.concatenate([rng.uniform(0, video.duration, 30), rng.permutation(starts)[:20], starts[[0, -1]]])
        asked = asked[asked <= video.duration]
        frames = video.frames_at(asked)
    expected = shown_at(times, asked)
    assert [number_of(picture) for picture in frames.pictures] == expected.tolist()
    np.testing.assert_allclose(frames.times, starts[expected], atol=1e-3)
    assert frames.exact.all() and not video.truncated
    assert video.duration == pytest.approx(starts[-1] + 0.04, abs=0.13)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(st.floats(0, 4.7), min_size=1, max_size=12))
def test_order_and_repetition_of_the_times_change_nothing(shelf, asked):
    with open_video(shelf / "varying.mp4") as video:
        together = video.frames_at(asked)
        alone = [video.frames_at([time]) for time in asked]
    assert together.times.tolist() == [frames.times[0] for frames in alone]
    for one, other in zip(together.pictures, alone, strict=True):
        assert np.array_equal(one, other.pictures[0])


def test_one_pass_and_one_seek_serve_a_group_of_pictures(shelf, monkeypatch):
    """Frames that nobody asks for and nobody refers to are not decoded, and the file is opened once."""
    with open_video(shelf / "steady.mp4") as video:
        seeks = []
        before, packets = video.decoded, video._packets
        monkeypatch.setattr(video, "_packets", lambda at=None: seeks.append(at) or packets(at))
        video.frames_at([0.40, 0.02, 0.44, 2.0, 2.04])  # in the first group of twelve frames, and in the fifth
        assert len(seeks) == 2 and None not in seeks
        assert video.decoded - before < 20


@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rotated_videos_come_upright(tmp_path, rotation, backend):
    with open_video(film(tmp_path / "turned.mov", steady(5), rotation=rotation), backend) as video:
        (picture,) = video.frames_at([0.0]).pictures
        assert picture.shape[:2] == (video.height, video.width)
        assert (picture.shape[0] > picture.shape[1]) == (rotation != 180)
    corners = {90: (-1, -1), 180: (0, -1), 270: (0, 0)}  # where the mark of the bottom left goes
    row, column = corners[rotation]
    assert picture[row, column].mean() > 200


@pytest.mark.parametrize("backend", BACKENDS)
def test_smaller_pictures_keep_their_aspect(shelf, backend):
    with open_video(shelf / "steady.mp4", backend) as video:
        small = video.frames_at([1.0], short=32)
        assert small.pictures[0].shape == (32, 96, 3) and number_of(small.pictures[0]) == 25
        assert video.frames_at([1.0], short=1000).pictures[0].shape == (64, 192, 3)
        with pytest.raises(ValueError, match=r"at least one pixel; got short=0"):
            video.frames_at([1.0], short=0)
        assert len(video.frames_at([])) == 0


@pytest.mark.parametrize("ending", ["mkv", "ts"])
def test_what_is_left_of_a_truncated_file_is_read_and_the_cut_is_told(tmp_path, ending):
    whole = film(tmp_path / f"film.{ending}", steady(150))
    with open_video(films.cut(whole, 0.5)) as video:
        assert 1.5 < video.duration < 4.5
        assert video.truncated == (ending == "mkv")  # the other has no header to be untrue to
        last = video.frames_at([video.duration - 0.2])
        assert number_of(last.pictures[0]) == int((video.duration - 0.2) / 0.04 + 1e-6) or not last.exact[0]
        with pytest.raises(ValueError, match=r"shows frames from 0 to \d\.\d+ seconds.*asked for 7.000"):
            video.frames_at([7.0])


@pytest.mark.parametrize("ending", ["mkv", "mp4"])
def test_sound_that_outlasts_the_pictures_is_no_cut(tmp_path, ending):
    with open_video(film(tmp_path / f"song.{ending}", steady(50), hum=5.0)) as video:
        assert not video.truncated and video.duration == pytest.approx(2, abs=0.05)
        assert number_of(video.frames_at([1.99]).pictures[0]) == 49


def test_a_truncated_file_with_its_index_in_front_is_read_up_to_the_cut(long):
    seconds = varying(200)[-1] / 1000
    with open_video(films.cut(long, 0.6)) as video:
        assert video.truncated and video.promised == pytest.approx(seconds, abs=0.13)
        assert 0.3 * seconds < video.duration < 0.8 * seconds
        asked = np.arange(0, video.duration - 0.2, 0.3)
        frames = video.frames_at(asked)
        numbers = np.array([number_of(picture) for picture in frames.pictures])
        assert (numbers == shown_at(varying(200), asked))[frames.exact].all() and frames.exact.mean() > 0.9
        with pytest.raises(ValueError, match=r"its header says 13.\d+, but it is cut short\); asked for 12.000"):
            video.frames_at([12.0])


@pytest.mark.parametrize("name", [*KINDS])
def test_the_number_of_threads_changes_no_frame(shelf, name):
    asked = np.random.default_rng(2).uniform(0, 0.04 if name == "one-frame.mp4" else 2.3, 25)
    with open_video(shelf / name, threads=1) as alone, open_video(shelf / name, threads=4) as together:
        expected, frames = alone.frames_at(asked), together.frames_at(asked)
        assert (alone.threads, together.threads) == (
            1,
            1 if name in ("without-times.h264", "times-of-decoding.avi") else 4,
        )
    assert frames.times.tolist() == expected.times.tolist() and frames.exact.all()
    for one, other in zip(frames.pictures, expected.pictures, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_every_frame_of_a_damaged_file_that_is_said_to_be_exact_is(long, place, threads):
    damaged = films.scratched(long, place, 10_000)
    asked = np.random.default_rng(0).uniform(0, 12, 60)
    with open_video(damaged, threads=threads) as video:
        frames = video.frames_at(asked)
        assert video.threads == 1  # one thread says what it could not read, several say it too late
    numbers = np.array([number_of(picture) for picture in frames.pictures])
    assert (numbers == shown_at(varying(200), asked))[frames.exact].all()
    assert 0.4 < frames.exact.mean() < 1  # what can be read is used


def test_two_readers_and_two_threads_share_a_file(shelf):
    name = shelf / "varying.mp4"
    asked = np.random.default_rng(1).uniform(0, 4.5, 20)
    with open_video(name) as one, open_video(name) as other:
        expected = one.frames_at(asked).times
        found = []
        threads = [
            threading.Thread(target=lambda video=video: found.append(video.frames_at(asked).times))
            for video in (one, other, one, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4 and all(np.array_equal(times, expected) for times in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_video_is_refused_with_its_name(tmp_path, backend):
    text = tmp_path / "notes.mp4"
    text.write_text("no pictures here\n" * 100)
    with pytest.raises(ValueError, match=r"notes.mp4 cannot be read as a video"):
        open_video(text, backend)
    with pytest.raises(FileNotFoundError, match=r"there is no video .*none.mp4'; give a video file"):
        open_video(tmp_path / "none.mp4", backend)
    whole = film(tmp_path / "film.mp4", steady(50))
    with pytest.raises(ValueError, match=r"cut-film.mp4 cannot be read as a video"):
        open_video(films.cut(whole, 0.5), backend)


def test_errors_of_opening_name_the_mend(tmp_path):
    with pytest.raises(ValueError, match=r"tone.wav holds no video that can be decoded, only sound"):
        open_video(films.sound(tmp_path / "tone.wav"))
    with pytest.raises(ValueError, match=r"has lost its index: copy it again"):
        open_video(films.cut(film(tmp_path / "film.mp4", steady(50)), 0.5))
    with pytest.raises(ValueError, match=r"read by 'pyav' or by 'opencv'; got backend='decord'"):
        open_video(tmp_path / "film.mp4", "decord")
    with pytest.raises(ValueError, match=r"at least one thread; got threads=0"):
        open_video(tmp_path / "film.mp4", threads=0)
    with pytest.raises(ValueError, match=r"OpenCV cannot tell how long it is; read it with PyAV"):
        open_video(film(tmp_path / "film.h264", steady(20)), "opencv")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_video_without_frames_is_refused(tmp_path, backend, ending):
    with av.open(str(tmp_path / f"header.{ending}"), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        file.start_encoding()
    with pytest.raises(ValueError, match=rf"header.{ending} (cannot be read as a video|holds no video)"):
        open_video(tmp_path / f"header.{ending}", backend)


@pytest.mark.parametrize(("backend", "library"), [("pyav", "av"), ("opencv", "cv2")])
def test_without_the_library_the_extra_is_named(shelf, monkeypatch, backend, library):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(ImportError, match=r'pip install "mmaccel\[video\]"'):
        open_video(shelf / "steady.mp4", backend)
