"""The detectors' contract, the grid, and the detector of coloured shapes."""

from __future__ import annotations

import numpy as np
import pytest

from mmaccel.named import plain, resolve
from mmaccel.pocket import world
from tests.video.golden import load_arrays, load_json
from video.colour_shape import ColourShape, read_phrase
from video.detectors import Detections, Detector, as_grid, by_cell, confidences, detect

PICTURE = np.zeros((40, 60, 3), np.uint8)
NAMES = [f"{colour} {shape}" for colour in world.COLOURS for shape in world.SHAPES]


def answer(boxes, labels, scores):
    """A detector that says the same of every picture."""
    return lambda pictures, phrases: [{"boxes": boxes, "labels": labels, "scores": scores} for _ in pictures]


def left_half(pictures, phrases):
    """A detector at the top of a module, which can be written down."""
    return [Detections(np.array([[0, 0, 5, 5]]), np.array([0]), np.array([0.5])) for _ in pictures]


def test_the_grid_is_read_as_the_release_reads_it():
    facts, arrays = load_json("tstar/cell_scores"), load_arrays("tstar/cell_scores")
    found = Detections(arrays["boxes"], arrays["labels"], arrays["scores"])
    weights = np.array([facts["weights"].get(text, facts["default_weight"]) for text in facts["texts"]])
    table = by_cell(found, tuple(facts["image_hw"]), *facts["grid"], len(weights))
    np.testing.assert_allclose((table * weights).max(1), arrays["confidence_map"].reshape(-1), rtol=1e-12)
    named = [{facts["texts"][label] for label in np.flatnonzero(row)} for row in table]
    assert named == [set(texts) for texts in facts["objects_per_cell"]]


def test_a_grid_shows_the_pictures_row_by_row():
    pictures = [np.full((2, 3, 3), number, np.uint8) for number in range(1, 6)]
    grid = as_grid(pictures, 2, 3)
    assert grid.shape == (4, 9, 3) and grid[::2, ::3, 0].tolist() == [[1, 2, 3], [4, 5, 0]]


def test_boxes_are_cut_to_the_picture_and_those_outside_are_left_out():
    boxes = [[-10, -5, 20, 20], [50, 30, 100, 100], [70, 10, 90, 20], [5, 5, 10, 10]]
    (found,) = detect(answer(boxes, [0, 1, 1, 0], [0.9, 0.8, 0.7, 0.0]), [PICTURE], ["a", "b"])
    assert found.boxes.tolist() == [[0, 0, 20, 20], [50, 30, 60, 40]]
    assert confidences([found], 2).tolist() == [[0.9, 0.8]]


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        (lambda pictures, phrases: [], r"one answer a picture; .*lambda.* gave 0 for 1"),
        (answer([[0, 0, 1, 1]], [2], [0.5]), r"labels number the 2 phrases from 0; .*gave \[2\]"),
        (answer([[0, 0, 1, 1]], [0.5], [0.5]), r"labels number the 2 phrases from 0"),
        (answer([[0, 0, 1, 1]], [0, 1], [0.5]), r"are as many; .*gave 1, 2 and 1"),
        (answer([[0, 0, 1, 1]], [0], [float("nan")]), r"gave a box or a confidence that is not finite"),
        (lambda pictures, phrases: [{"boxes": []}], r"has boxes, labels and scores; .* gave none called 'labels'"),
    ],
)
def test_answers_that_do_not_fit_are_refused_by_the_detectors_name(detector, message):
    with pytest.raises(ValueError, match=message):
        detect(detector, [PICTURE], ["a", "b"])


def test_a_detector_that_raises_is_named_with_its_error():
    def broken(pictures, phrases):
        raise KeyError("no such weights")

    with pytest.raises(RuntimeError, match=r"the detector .*broken failed on 1 pictures of up to 40 x 60 .*no such"):
        detect(broken, [PICTURE], ["a"])
    assert detect(broken, [], ["a"]) == []


@pytest.mark.parametrize(("pixels", "sizes"), [(96, (0.2, 0.3)), (128, (0.14, 0.2)), (64, (0.3, 0.36))])
def test_coloured_shapes_of_eighteen_pixels_and_more_are_seen_and_no_others(pixels, sizes):
    rng = np.random.default_rng(1)
    scenes = [world.sample_scene(rng, (0, 3), sizes) for _ in range(25)]
    pictures = [world.render(scene, pixels) for scene in scenes]
    found = detect(ColourShape(), pictures, NAMES)
    for scene, row, one in zip(scenes, confidences(found, len(NAMES)), found, strict=True):
        assert {name for name, seen in zip(NAMES, row, strict=True) if seen} == {thing.name for thing in scene.things}
        assert len(one.boxes) == len(scene.things)
        for thing in scene.things:
            inside = (one.boxes[:, :2] < np.array([thing.x, thing.y]) * pixels) & (
                one.boxes[:, 2:] > np.array([thing.x, thing.y]) * pixels
            )
            assert inside.all(1).any()


def test_a_batch_of_pictures_gives_what_each_gives_alone():
    rng = np.random.default_rng(2)
    pictures = [world.render(world.sample_scene(rng, (1, 3), (0.2, 0.3)), size) for size in (96, 64, 128)]
    together = confidences(detect(ColourShape(), pictures, NAMES), len(NAMES))
    alone = [confidences(detect(ColourShape(), [picture], NAMES), len(NAMES))[0] for picture in pictures]
    assert np.array_equal(together, alone)


@pytest.mark.parametrize(
    ("phrase", "read"),
    [
        ("red triangle", ("red", "triangle")),
        ("a red thing", ("red", None)),
        ("Crosses", (None, "cross")),
        ("the white circles", ("white", "circle")),
        ("cross", (None, "cross")),
        ("blue", ("blue", None)),
    ],
)
def test_phrases_are_read(phrase, read):
    assert read_phrase(phrase) == read


@pytest.mark.parametrize("phrase", ["", "dog", "red dog", "red triangle left", "thing"])
def test_phrases_that_cannot_be_read_are_refused_with_what_can(phrase):
    if phrase == "thing":
        assert read_phrase(phrase) == (None, None)
        return
    with pytest.raises(ValueError, match=r"colour-shape cannot read .*; it sees red, .* and circle, .*'?red triangle"):
        read_phrase(phrase)


def test_a_red_disc_is_red_and_not_blue():
    picture = world.render(world.Scene((world.Thing("circle", "red", 0.5, 0.5, 0.3),)), 96)
    seen = confidences(detect(ColourShape(), [picture], ["red circle", "blue circle", "red thing"]), 3)[0]
    assert seen[0] > 0.8 and seen[1] == 0 and seen[2] == 1


def test_detectors_are_named_written_down_and_read_again():
    assert resolve("colour-shape", Detector) == ColourShape()
    assert resolve({"detector": "colour-shape", "smallest": 5}, Detector) == ColourShape(smallest=5)
    assert ColourShape(smallest=5).to_dict() == {"detector": "colour-shape", "smallest": 5}
    assert resolve(plain(left_half, Detector), Detector) is left_half


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r"a detector is a Detector, a callable detector\(pictures, phrases\), a name, a dictionary .*; got 3"),
        (ColourShape, r"ColourShape is a class; build one, with its settings: ColourShape\(\)"),
        ("colour-shap", r"there is no detector 'colour-shap'; did you mean 'colour-shape'"),
        ({"smallest": 3}, r'a detector is a mapping with a key "detector", e.g. .*; got'),
        ({"detector": "colour-shape", "small": 3}, r"colour-shape has no setting 'small'; did you mean 'smallest'"),
        ({"detector": "video.detectors:detect"}, r'the key "detector" names a class of detectors'),
        ("video.nothing:at_all", r"cannot be imported .*package.module:name"),
        ("video.detectors:nothing", r"does not exist: video.detectors has no 'nothing'"),
    ],
)
def test_what_is_no_detector_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        resolve(value, Detector)


def test_a_lambda_can_be_used_but_not_written_down():
    with pytest.raises(ValueError, match=r"can be used, but not written down. Define it as a function"):
        plain(lambda pictures, phrases: [], Detector)


def test_without_opencv_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(ImportError, match=r'colour-shape needs OpenCV.*pip install "mmaccel\[video\]"'):
        detect(ColourShape(), [PICTURE], ["red circle"])
