"""The pocket detector: what its training asks of it is what pictures show, and the shipped one sees it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModel, YolosForObjectDetection

from mmaccel import pocket
from mmaccel.pocket import world
from mmaccel.pocket.train.clip import CLASSES
from mmaccel.pocket.train.common import to_pixels
from video import Film, TStar, find_keyframes
from video import detector_training as training
from video.checkpoint_detectors import PocketDetector
from video.detectors import confidences, detect
from video.pocket_haystack import make


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return training.make_model(AutoModel.from_pretrained(pocket.path("pocket-clip"))).eval()


def test_a_view_says_what_its_picture_shows():
    rng, read = world.train_rng(5), 0
    for _ in range(30):
        view = training.sample_view(rng)
        assert view.image.shape == (96, 96, 3) and len(view.classes) == len(view.boxes)
        things = world.parse(view.image).things
        if sorted(thing.name for thing in things) == sorted(
            CLASSES[label] for label in view.classes
        ):  # not too blurred
            for thing in things:
                alike = view.boxes[view.classes == CLASSES.index(thing.name), :2]
                assert np.abs(alike - (thing.x, thing.y)).max(1).min() < 0.05
            read += 1
        for x, y, width, height in view.boxes:
            left, top = int(96 * (x - width / 4)), int(96 * (y - height / 4))
            inside = view.image[top : int(96 * y) + 1, left : int(96 * x) + 1]
            assert inside.max() > 90
    assert read > 20


def test_every_thing_has_a_detection_token_of_its_own_near_it():
    rng = np.random.default_rng(0)
    for count in (0, 1, 4, 20):
        boxes = np.concatenate([rng.random((count, 2)), np.full((count, 2), 0.2)], axis=1)
        tokens = training.tokens_of(boxes)
        assert len(set(tokens.tolist())) == count
        if count == 1:
            place = (tokens[0] % 6 + 0.5) / 6, (tokens[0] // 6 + 0.5) / 6
            assert np.abs(boxes[0, :2] - place).max() <= 1 / 12 + 1e-9


def test_right_answers_cost_nothing(model):
    views = [training.sample_view(world.train_rng(6, number)) for number in range(4)]
    output = model(to_pixels([view.image for view in views]))
    output.logits = torch.zeros_like(output.logits)
    output.logits[..., -1] = 50
    for row, view in enumerate(views):
        tokens = training.tokens_of(view.boxes)
        output.logits[row, tokens] = 50 * torch.nn.functional.one_hot(torch.from_numpy(view.classes), 25).float()
        output.pred_boxes[row, tokens] = torch.from_numpy(view.boxes)
    losses = training.losses(output, views)
    assert all(loss.item() == pytest.approx(0, abs=1e-5) for loss in losses.values()), losses
    output.logits[..., -1] += 100  # it sees nothing
    assert training.losses(output, views)["class"].item() > 5


def test_the_model_starts_with_what_pocket_clips_patches_know(model):
    tower = AutoModel.from_pretrained(pocket.path("pocket-clip")).vision_model
    pixels = to_pixels([training.sample_view(world.train_rng(7, number)).image for number in range(4)])
    with torch.no_grad():
        theirs = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        mine = model(pixels, output_hidden_states=True).hidden_states[-1][:, 1 : 1 + theirs.shape[1]]
    assert torch.cosine_similarity(mine, theirs, dim=-1).mean() > 0.85


def test_the_shipped_detector_sees_a_thing_where_it_is():
    assert isinstance(YolosForObjectDetection.from_pretrained(pocket.path("pocket-detector")), YolosForObjectDetection)
    scene = world.Scene((world.Thing("triangle", "red", 0.3, 0.6, 0.2), world.Thing("circle", "blue", 0.75, 0.25, 0.2)))
    picture, wide = world.render(scene, 96), world.render(scene, (192, 192))
    names = ["red triangle", "blue circle", "green cross"]
    for found, side in zip(detect(PocketDetector(), [picture, wide], names), (96, 192), strict=True):
        sure = found.scores > 0.6
        assert set(found.labels[sure].tolist()) == {0, 1}
        for label, thing in enumerate(scene.things):
            left, top, right, bottom = found.boxes[sure & (found.labels == label)].T
            x, y = thing.x * side, thing.y * side
            assert ((left < x) & (x < right) & (top < y) & (y < bottom)).any()
    table = confidences(detect("pocket-detector", [], names), 3)
    assert table.shape == (0, 3)
    with pytest.raises(ValueError, match=r"trained on classes, and 'red thing' is none"):
        detect(PocketDetector(), [picture], ["red thing"])


def test_tstar_finds_an_event_by_its_name(tmp_path):
    made = make(tmp_path / "film.mp4", seconds=120, seed=3)
    with Film(made.path) as film:
        for event in made.events:
            found = find_keyframes(film, TStar(), "pocket-detector", [event.target.name], frames=4)
            assert np.abs(found.times - event.centre).min() <= 5
            assert event.target.begin - 0.2 <= found.verified[event.target.name] < event.target.end


@pytest.mark.slow
def test_the_figures_of_the_docstring():
    found = training.figures(pocket.path("pocket-detector"))
    assert found["recall"] > 0.9 and found["held"] > 0.8 and found["false"] < 0.005
