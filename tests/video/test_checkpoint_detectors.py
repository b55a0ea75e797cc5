"""Detectors from checkpoints: tiny random models of every family keep the contract; pocket-clip sees what is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

from mmaccel import pocket
from mmaccel.named import resolve
from mmaccel.pocket import world
from video import Film, find_keyframes
from video.checkpoint_detectors import FAMILIES, CheckpointDetector, ClipSimilarity, phrase_of
from video.detectors import Detector, confidences, detect

PHRASES = ["red circle", "blue square"]
rng = np.random.default_rng(0)
PICTURES = [
    rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    for height, width in ((40, 60), (40, 60), (64, 48), (50, 50))
]
NARROW = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_owl(folder: Path, kind: str) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(pocket.path("pocket-clip"))
    config = getattr(tf, f"{kind}Config")(
        text_config={**NARROW, "vocab_size": len(tokenizer), "max_position_embeddings": 32},
        vision_config={**NARROW, "image_size": 64, "patch_size": 16},
        projection_dim=32,
    )
    images = getattr(tf, f"{kind}ImageProcessorPil")(
        size={"height": 64, "width": 64}, crop_size={"height": 64, "width": 64}
    )
    getattr(tf, f"{kind}Processor")(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    getattr(tf, f"{kind}ForObjectDetection")(config).save_pretrained(folder)


def save_dino(folder: Path, kind: str) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "red", "circle", "blue", "square"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = tf.BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    config = getattr(tf, f"{kind}Config")(
        backbone_config=tf.SwinConfig(
            image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config={**NARROW, "model_type": "bert", "vocab_size": len(words)},
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=12,
        encoder_attention_heads=2, decoder_attention_heads=2, max_text_len=32,
    )  # fmt: skip
    images = tf.GroundingDinoImageProcessorPil(size={"shortest_edge": 128, "longest_edge": 192})
    tf.GroundingDinoProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    getattr(tf, f"{kind}ForObjectDetection")(config).save_pretrained(folder)


def save_yolos(folder: Path, kind: str) -> None:
    config = tf.YolosConfig(
        **NARROW, image_size=[64, 64], patch_size=16, num_detection_tokens=6,
        id2label=dict(enumerate(["cat", *PHRASES])),
    )  # fmt: skip
    tf.YolosImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    tf.YolosForObjectDetection(config).save_pretrained(folder)


SAVERS = {
    "owlv2": (save_owl, "Owlv2"),
    "owlvit": (save_owl, "OwlViT"),
    "grounding-dino": (save_dino, "GroundingDino"),
    "mm-grounding-dino": (save_dino, "MMGroundingDino"),
    "yolos": (save_yolos, "Yolos"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for number, (name, (save, kind)) in enumerate(SAVERS.items()):
        torch.manual_seed(number)
        made[name] = tmp_path_factory.mktemp("detectors") / name
        save(made[name], kind)
    return made


def test_every_family_is_tested():
    assert set(SAVERS) == set(FAMILIES)


@pytest.mark.parametrize("family", SAVERS)
def test_a_family_keeps_the_contract(folders, family):
    """Boxes inside pictures of any shape, labels that number the phrases, and a batch that equals its pictures."""
    detector = CheckpointDetector(model=folders[family], threshold=0.001)
    together = detect(detector, PICTURES, PHRASES)
    assert sum(len(one.boxes) for one in together) > 0
    for picture, found in zip(PICTURES, together, strict=True):
        assert (found.boxes >= 0).all() and (found.boxes <= np.array(picture.shape[1::-1] * 2)).all()
        assert set(found.labels) <= {0, 1} and (found.scores > 0).all() and (found.scores <= 1).all()
    alone = [confidences(detect(detector, [picture], PHRASES), 2)[0] for picture in PICTURES]
    np.testing.assert_allclose(confidences(together, 2), alone, atol=1e-4)
    swapped = confidences(detect(detector, PICTURES, PHRASES[::-1]), 2)
    if family != "grounding-dino" and family != "mm-grounding-dino":  # these read all phrases together
        np.testing.assert_allclose(swapped[:, ::-1], confidences(together, 2), atol=1e-4)


def test_a_threshold_leaves_out_and_a_scale_raises(folders):
    few = detect(CheckpointDetector(model=folders["owlv2"], threshold=1.0), PICTURES, PHRASES)
    assert not any(len(one.boxes) for one in few)
    plain, raised = (
        confidences(detect(CheckpointDetector(model=folders["owlv2"], threshold=0.0, full=full), PICTURES, PHRASES), 2)
        for full in (1.0, 0.5)
    )
    np.testing.assert_allclose(raised, np.minimum(2 * plain, 1), rtol=1e-6)


def test_a_closed_vocabulary_refuses_other_phrases(folders):
    with pytest.raises(ValueError, match=r"trained on classes, and 'cats' is none; did you mean 'cat'\?"):
        detect(CheckpointDetector(model=folders["yolos"]), PICTURES, ["cats"])


@pytest.mark.parametrize(
    ("said", "place"),
    [("red circle", 0), ("Blue Square", 1), ("square", 1), ("a red circle", 0), ("dog", None), ("", None)],
)
def test_what_a_model_says_is_brought_back_to_a_phrase(said, place):
    assert phrase_of(said, ["red circle", "blue square."]) == place


def test_wrong_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint folder 'none' .*snapshot_download"):
        detect(CheckpointDetector(model="none"), PICTURES, PHRASES)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "detr"}))
    with pytest.raises(ValueError, match=r"a detector of the family 'detr' is not supported; .*known: grounding-dino"):
        detect(CheckpointDetector(model=tmp_path), PICTURES, PHRASES)
    with pytest.raises(ValueError, match=r"clip-similarity reads checkpoints of the family 'clip'; .* is 'detr'"):
        detect(ClipSimilarity(model=tmp_path), PICTURES, PHRASES)
    with pytest.raises(ValueError, match=r"lies in \(0, 1\]; got full=0"):
        CheckpointDetector(model="x", full=0)
    with pytest.raises(ValueError, match=r"is below the one that counts as 1; got 1.0, 0.5"):
        ClipSimilarity(low=1.0, high=0.5)


def test_clip_finds_the_picture_of_a_phrase():
    names = [f"{colour} {shape}" for colour in ("red", "blue", "green") for shape in ("circle", "square", "cross")]
    scenes = [world.Scene((world.Thing(*name.split()[::-1], 0.5, 0.5, 0.3),)) for name in names]
    pictures = [world.render(scene, 96) for scene in scenes]
    scores = confidences(detect(ClipSimilarity(), pictures, names), len(names))
    assert (scores.argmax(0) == range(len(names))).mean() > 0.8
    found = detect(ClipSimilarity(), pictures[:1], names)[0]
    assert found.boxes.tolist() == [[0, 0, 96, 96]] * len(found.labels)


def test_a_search_shows_such_a_detector_one_cell_at_a_time(haystack):
    event = haystack.events[0]
    with Film(haystack.path) as film:
        found = find_keyframes(film, "dense-retrieval", "clip-similarity", [event.target.name], frames=4, budget=40)
        assert found.ledger.spent["detector_calls"] == found.ledger.spent["frames"] == 40
        grids = find_keyframes(film, "tstar", "clip-similarity", [event.target.name], frames=4, budget=16)
        assert grids.ledger.spent["detector_calls"] == 16


def test_they_are_written_down_and_read_again():
    for detector in (CheckpointDetector(model="folder", full=0.5), ClipSimilarity(low=0.1)):
        assert resolve(json.loads(json.dumps(detector.to_dict())), Detector) == detector
