"""What a search sees with: a detector takes pictures and phrases, and says where it sees which phrase, and how surely.

Any callable `detector(pictures, phrases)` will do.  pictures: uint8 RGB, [height, width, 3], of any sizes.  It returns
one `Detections` a picture (or a mapping with the same keys).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from mmaccel.named import Named, NamedField, name_of
from video.reader import Picture

Confidences = Float[np.ndarray, "rows phrases"]


@dataclass(frozen=True)
class Detections:
    """What was seen in one picture.

    boxes: [n, 4], left, top, right, bottom, in pixels.  labels: which phrase, [n].  scores: confidences, [n], in [0, 1]
    where thresholds are to mean something.
    """

    boxes: NDArray[np.floating[Any]]
    labels: NDArray[np.integer[Any]]
    scores: NDArray[np.floating[Any]]


class Detector(Named):
    """Base class of our detectors.  Subclasses are frozen dataclasses; their fields are the settings.

    Models are loaded at the first call.
    """

    kind: ClassVar[str] = "detector"
    called: ClassVar[str | None] = "detector(pictures, phrases)"
    whole_pictures: ClassVar[bool] = False
    """Whether it scores pictures as a whole, so that the cells of a grid are shown to it one by one."""

    @abstractmethod
    def __call__(self, pictures: Sequence[Picture], phrases: Sequence[str]) -> list[Detections]:
        """What it sees of the phrases in each picture."""


DetectorField = Annotated[Any, NamedField(Detector)]
"""The type of a dataclass field that holds a detector."""


def detect(detector: Any, pictures: Sequence[Picture], phrases: Sequence[str]) -> list[Detections]:
    """What a detector says, checked: boxes are cut to the picture, those outside it and zero confidences are left out.

    Raises RuntimeError from whatever a callable raised (ours speak for themselves), ValueError for answers that do not
    fit the question.
    """
    if not pictures:
        return []
    try:
        answers = list(detector(pictures, phrases))
    except Exception as error:
        if isinstance(detector, Detector):
            raise
        raise RuntimeError(
            f"the detector {name_of(detector)} failed on {len(pictures)} pictures of up to "
            f"{' x '.join(map(str, max(picture.shape[:2] for picture in pictures)))} pixels: {error}"
        ) from error
    if len(answers) != len(pictures):
        raise ValueError(
            f"a detector gives one answer a picture; {name_of(detector)} gave {len(answers)} for {len(pictures)}"
        )
    return [_checked(name_of(detector), *pair, len(phrases)) for pair in zip(answers, pictures, strict=True)]


def _checked(name: str, answer: Any, picture: Picture, phrases: int) -> Detections:
    parts = answer if isinstance(answer, Mapping) else vars(answer)
    try:
        boxes, labels, scores = (np.asarray(parts[key]) for key in ("boxes", "labels", "scores"))
    except KeyError as error:
        raise ValueError(f"a detection has boxes, labels and scores; {name} gave none called {error}") from None
    boxes, labels, scores = boxes.reshape(-1, 4).astype(float), labels.reshape(-1), scores.reshape(-1).astype(float)
    if not len(boxes) == len(labels) == len(scores):
        raise ValueError(
            f"boxes, labels and scores are as many; {name} gave {len(boxes)}, {len(labels)} and {len(scores)}"
        )
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise ValueError(f"{name} gave a box or a confidence that is not finite")
    if len(labels) and not (labels.min() >= 0 and labels.max() < phrases and np.issubdtype(labels.dtype, np.integer)):
        raise ValueError(f"labels number the {phrases} phrases from 0; {name} gave {sorted(set(labels.tolist()))}")
    height, width = picture.shape[:2]
    cut = boxes.clip(0, [width, height, width, height])
    inside = (cut[:, 2] > cut[:, 0]) & (cut[:, 3] > cut[:, 1]) & (scores > 0)
    return Detections(cut[inside], labels[inside].astype(np.int64), scores[inside])


def confidences(found: Sequence[Detections], phrases: int) -> Confidences:
    """The best confidence of each phrase in each picture, 0 where it was not seen: [pictures, phrases]."""
    table = np.zeros((len(found), phrases))
    for row, one in zip(table, found, strict=True):
        np.maximum.at(row, one.labels, one.scores)
    return table


def by_cell(found: Detections, size: tuple[int, int], rows: int, columns: int, phrases: int) -> Confidences:
    """The best confidence of each phrase in each cell of a grid picture: [rows * columns, phrases], row by row.

    A box belongs to the cell that holds its centre.  size: (height, width) of the picture.
    """
    table = np.zeros((rows * columns, phrases))
    x, y = (found.boxes[:, 0] + found.boxes[:, 2]) / 2, (found.boxes[:, 1] + found.boxes[:, 3]) / 2
    row = np.clip((y / size[0] * rows).astype(int), 0, rows - 1)
    column = np.clip((x / size[1] * columns).astype(int), 0, columns - 1)
    np.maximum.at(table, (row * columns + column, found.labels), found.scores)
    return table


def as_grid(pictures: Sequence[Picture], rows: int, columns: int) -> Picture:
    """Pictures of one size, row by row, as one; black where there are fewer pictures than cells."""
    height, width = pictures[0].shape[:2]
    grid = np.zeros((rows * height, columns * width, 3), np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * height, number % columns * width
        grid[top : top + height, left : left + width] = picture
    return grid
