"""Films: the pictures come back in order, and what is no film is refused."""

import av
import numpy as np
import pytest

from mmaccel import films
from mmaccel.films import write_film


def greys(count: int, side: int = 32) -> list[np.ndarray]:
    return [np.full((side, side, 3), 20 * number, np.uint8) for number in range(count)]


def test_the_pictures_come_back_in_order_and_at_their_rate(tmp_path):
    write_film(tmp_path / "film.mp4", greys(10), rate=5)
    with av.open(str(tmp_path / "film.mp4")) as file:
        seen = [(frame.time, frame.to_ndarray(format="rgb24").mean()) for frame in file.decode(video=0)]
    assert [time for time, _ in seen] == pytest.approx([number / 5 for number in range(10)])
    assert [value for _, value in seen] == pytest.approx([20 * number for number in range(10)], abs=3)


def test_a_film_without_pictures_or_with_odd_sides_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a video needs at least one picture; got none"):
        write_film(tmp_path / "film.mp4", [], rate=5)
    with pytest.raises(ValueError, match=r"H\.264 videos have even sides; got pictures of 33 x 33 pixels"):
        write_film(tmp_path / "film.mp4", greys(1, side=33), rate=5)


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    def refuse(name):
        raise ImportError(f"no {name}")

    monkeypatch.setattr(films, "import_module", refuse)
    with pytest.raises(ImportError, match=r'videos are written by PyAV.*pip install "mmaccel\[video\]"'):
        write_film(tmp_path / "film.mp4", greys(1), rate=5)
