"""Detectors from checkpoints of transformers: open vocabularies, a closed one, and similarity to a text."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mmaccel import pocket
from mmaccel.checkpoints import load_part, load_weights
from mmaccel.registry import suggest
from video.detectors import Detections, Detector
from video.reader import Picture

ROWS = 8  # pictures that go through a model at a time


@dataclass(frozen=True)
class Family:
    """What differs between families of detectors.

    model: the auto class of the weights; processor: of what prepares pictures.  threshold: confidences below are left
    out; families are not calibrated alike.  run: from loaded parts, pictures, phrases and threshold to detections.
    """

    model: str
    processor: str
    threshold: float
    run: Callable[[Any, Any, Sequence[Picture], Sequence[str], float], list[Detections]]


@dataclass(frozen=True, kw_only=True)
class CheckpointDetector(Detector):
    """OWLv2, OWL-ViT, Grounding DINO, MM Grounding DINO or YOLOS from a checkpoint folder of transformers.

    model: the folder.  threshold: confidences below it are left out; None is the family's own (owlv2 0.1, owlvit 0.005,
    grounding-dino and mm-grounding-dino 0.25, yolos 0.1).  full: the model's confidence that counts as 1, for a model
    whose sure finds score low, so that a search's threshold keeps its meaning.  device: where it runs.
    YOLOS knows the classes it was trained on; other phrases are refused.
    """

    name: ClassVar[str] = "checkpoint"

    model: str
    threshold: float | None = None
    full: float = 1.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", str(self.model))
        if not 0 < self.full <= 1:
            raise ValueError(f"the confidence that counts as 1 lies in (0, 1]; got full={self.full!r}")

    def __call__(self, pictures: Sequence[Picture], phrases: Sequence[str]) -> list[Detections]:
        import torch

        family, model, processor = _loaded(self.model, self.device)
        least = family.threshold if self.threshold is None else self.threshold
        found: list[Detections] = []
        with torch.no_grad():
            for _, alike in groupby(pictures, key=lambda picture: picture.shape):  # padded batches change some families
                same = list(alike)
                for start in range(0, len(same), ROWS):
                    found += family.run(model, processor, same[start : start + ROWS], phrases, least)
        return [Detections(one.boxes, one.labels, np.minimum(one.scores / self.full, 1)) for one in found]


@dataclass(frozen=True, kw_only=True)
class PocketDetector(CheckpointDetector):
    """Coloured shapes such as "red triangle", by pocket-detector, a small YOLOS that was trained on them.

    It reads pictures of 96 pixels a side, so the cells of a grid are shown to it one by one.  Its boxes are rough,
    several may be of one thing, and it knows the embedded world alone.  Settings as for `checkpoint`.
    """

    name: ClassVar[str] = "pocket-detector"
    whole_pictures: ClassVar[bool] = True

    model: str = "pocket-detector"
    full: float = 0.6


def _owl(model: Any, processor: Any, pictures: Sequence[Picture], phrases: Sequence[str], least: float) -> Any:
    inputs = processor(text=[list(phrases)] * len(pictures), images=list(pictures), return_tensors="pt")
    outputs = model(**inputs.to(model.device))
    found = processor.post_process_grounded_object_detection(outputs, least, _sizes(pictures))
    return [_detections(one, one["labels"]) for one in found]


def _grounding_dino(
    model: Any, processor: Any, pictures: Sequence[Picture], phrases: Sequence[str], least: float
) -> Any:
    prompt = " ".join(f"{phrase.lower().strip(' .')} ." for phrase in phrases)
    inputs = processor(text=[prompt] * len(pictures), images=list(pictures), return_tensors="pt").to(model.device)
    outputs = model(**inputs)
    found = processor.post_process_grounded_object_detection(
        outputs, inputs["input_ids"], threshold=least, text_threshold=least, target_sizes=_sizes(pictures)
    )
    return [_named(one, [phrase_of(said, phrases) for said in one["text_labels"]]) for one in found]


def _yolos(model: Any, processor: Any, pictures: Sequence[Picture], phrases: Sequence[str], least: float) -> Any:
    known = {str(name).lower(): int(number) for number, name in model.config.id2label.items()}
    for phrase in phrases:
        if phrase.lower() not in known:
            raise ValueError(f"this YOLOS was trained on classes, and {phrase!r} is none; {suggest(phrase, known)}")
    numbers = {known[phrase.lower()]: place for place, phrase in enumerate(phrases)}
    outputs = model(**processor(images=list(pictures), return_tensors="pt").to(model.device))
    found = processor.post_process_object_detection(outputs, threshold=least, target_sizes=_sizes(pictures))
    return [_named(one, [numbers.get(int(label)) for label in one["labels"]]) for one in found]


FAMILIES = {
    "owlv2": Family("AutoModelForZeroShotObjectDetection", "AutoProcessor", 0.1, _owl),
    "owlvit": Family("AutoModelForZeroShotObjectDetection", "AutoProcessor", 0.005, _owl),
    "grounding-dino": Family("AutoModelForZeroShotObjectDetection", "AutoProcessor", 0.25, _grounding_dino),
    "mm-grounding-dino": Family("AutoModelForZeroShotObjectDetection", "AutoProcessor", 0.25, _grounding_dino),
    "yolos": Family("AutoModelForObjectDetection", "AutoImageProcessor", 0.1, _yolos),
}


def phrase_of(said: str, phrases: Sequence[str]) -> int | None:
    """Which phrase a model's words mean: the same one, or else the first that holds them or that they hold."""
    said = said.strip().lower()
    known = [phrase.lower().strip(" .") for phrase in phrases]
    if said in known:
        return known.index(said)
    return next((place for place, phrase in enumerate(known) if said and (said in phrase or phrase in said)), None)


def _named(found: Any, labels: Sequence[int | None]) -> Detections:
    """The detections whose label is one of the phrases."""
    kept = np.array([label is not None for label in labels], dtype=bool)
    all_of_them = _detections(found, np.array([-1 if label is None else label for label in labels], dtype=np.int64))
    return Detections(all_of_them.boxes[kept], all_of_them.labels[kept], all_of_them.scores[kept])


def _detections(found: Any, labels: Any) -> Detections:
    boxes, scores = (found[key].float().cpu().numpy() for key in ("boxes", "scores"))
    numbers = labels if isinstance(labels, np.ndarray) else labels.cpu().numpy()
    return Detections(boxes.reshape(-1, 4), numbers.astype(np.int64), scores)


def _sizes(pictures: Sequence[Picture]) -> list[tuple[int, int]]:
    return [(picture.shape[0], picture.shape[1]) for picture in pictures]


@lru_cache(maxsize=2)
def _loaded(folder: str, device: str) -> tuple[Family, Any, Any]:
    import transformers

    path = find_folder(folder)
    kind = model_type(path)
    if kind not in FAMILIES:
        raise ValueError(f"{folder}: a detector of the family {kind!r} is not supported; {suggest(kind, FAMILIES)}")
    family = FAMILIES[kind]
    model = load_weights(getattr(transformers, family.model), path).to(device)
    return family, model, load_part(getattr(transformers, family.processor), path)


class PictureScorer(Detector):
    """Base class of detectors that score pictures as a whole: the box is the picture."""

    whole_pictures: ClassVar[bool] = True

    @abstractmethod
    def score(self, pictures: Sequence[Picture], phrases: Sequence[str]) -> np.ndarray[Any, Any]:
        """How surely each picture shows each phrase, [pictures, phrases], in [0, 1]."""

    def __call__(self, pictures: Sequence[Picture], phrases: Sequence[str]) -> list[Detections]:
        labels = np.arange(len(phrases))
        boxes = [np.tile([0.0, 0.0, picture.shape[1], picture.shape[0]], (len(phrases), 1)) for picture in pictures]
        scores = self.score(pictures, phrases)
        return [Detections(box, labels, row) for box, row in zip(boxes, scores, strict=True)]


@dataclass(frozen=True, kw_only=True)
class ClipSimilarity(PictureScorer):
    """How similar a frame is to a phrase, by CLIP: the cosine, moved from [low, high] to [0, 1].

    model: a CLIP checkpoint folder of transformers, or pocket-clip, which knows coloured shapes only.  low, high: the
    cosines that count as 0 and as 1; pocket-clip's unless you say otherwise (published models: about 0.15 and 0.35).
    """

    name: ClassVar[str] = "clip-similarity"

    model: str = "pocket-clip"
    low: float = 0.0
    high: float = 1.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", str(self.model))
        if not self.low < self.high:
            raise ValueError(
                f"the cosine that counts as 0 is below the one that counts as 1; got {self.low}, {self.high}"
            )

    def score(self, pictures: Sequence[Picture], phrases: Sequence[str]) -> np.ndarray[Any, Any]:
        import torch
        from torch.nn.functional import normalize

        model, images, texts = _clip(self.model, self.device)
        length = model.config.text_config.max_position_embeddings
        tokens = texts(list(phrases), padding=True, truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            said = normalize(model.get_text_features(**tokens.to(self.device)).pooler_output, dim=-1)
            seen = [
                normalize(
                    model.get_image_features(
                        images(pictures[start : start + ROWS], return_tensors="pt")["pixel_values"].to(self.device)
                    ).pooler_output,
                    dim=-1,
                )
                for start in range(0, len(pictures), ROWS)
            ]
        cosines = (torch.cat(seen) @ said.T).float().cpu().numpy()
        return np.asarray(np.clip((cosines - self.low) / (self.high - self.low), 0, 1))


@lru_cache(maxsize=2)
def _clip(folder: str, device: str) -> tuple[Any, Any, Any]:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    path = find_folder(folder)
    if (kind := model_type(path)) != "clip":
        raise ValueError(f"clip-similarity reads checkpoints of the family 'clip'; {folder} is {kind!r}")
    return load_weights(AutoModel, path).to(device), load_part(AutoImageProcessor, path), load_part(AutoTokenizer, path)


def find_folder(model: str) -> Path:
    """The folder of a checkpoint; a pocket model's name stands for its own.  Raises FileNotFoundError with the mend."""
    if model in pocket.names() and not Path(model).is_dir():
        return pocket.path(model)
    if (Path(model) / "config.json").is_file():
        return Path(model)
    raise FileNotFoundError(
        f"there is no checkpoint folder {model!r} with a config.json. Nothing is downloaded here: fetch it with "
        "huggingface_hub.snapshot_download and give the folder"
    )


def model_type(folder: Path) -> str:
    """The family of a checkpoint, as its config.json says."""
    return str(json.loads((folder / "config.json").read_text()).get("model_type"))
