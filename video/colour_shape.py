"""A detector of coloured shapes, by OpenCV: exact on the pocket world, an honest baseline elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from video.detectors import Detections, Detector
from video.reader import Picture

HUES = {
    "red": (172, 8),
    "orange": (9, 19),
    "yellow": (20, 35),
    "green": (40, 85),
    "blue": (100, 128),
    "purple": (130, 165),
}
"""First and last hue of a colour, in OpenCV's half degrees; red goes over the end."""
COLOURS = (*HUES, "white")
SHAPES = ("circle", "square", "triangle", "cross")
FILLS = {"circle": 0.785, "square": 1.0, "triangle": 0.5, "cross": 0.59}
"""The share of its bounding box that a shape fills; a cross (arms 0.36 wide) is told by its hull, which it leaves."""
CROSS = 0.87  # a blob that fills less than this share of its convex hull is a cross
SATURATED, BRIGHT, PALE = 85, 100, 60  # of 255
THINGS = ("thing", "shape", "object")


@dataclass(frozen=True, kw_only=True)
class ColourShape(Detector):
    """Sees "red triangle", "red thing" or "triangle": bright blobs of one hue, told apart by how they fill their box.

    smallest: the least area of a blob, in pixels.
    A confidence is 1 for a shape that fills its box as the ideal one does, and falls to 0 half-way to the next shape.
    """

    name: ClassVar[str] = "colour-shape"

    smallest: int = 20

    def __call__(self, pictures: Sequence[Picture], phrases: Sequence[str]) -> list[Detections]:
        wanted = [read_phrase(phrase) for phrase in phrases]
        return [self._seen(picture, wanted) for picture in pictures]

    def _seen(self, picture: Picture, wanted: Sequence[tuple[str | None, str | None]]) -> Detections:
        boxes, labels, scores = [], [], []
        for colour in {colour for colour, _ in wanted if colour} if all(c for c, _ in wanted) else COLOURS:
            for box, shape, confidence in self._blobs(picture, colour):
                for label, (that_colour, that_shape) in enumerate(wanted):
                    if that_colour in (None, colour) and that_shape in (None, shape):
                        boxes.append(box)
                        labels.append(label)
                        scores.append(confidence if that_shape else 1.0)
        return Detections(np.array(boxes, float).reshape(-1, 4), np.array(labels, np.int64), np.array(scores, float))

    def _blobs(self, picture: Picture, colour: str) -> list[tuple[tuple[int, int, int, int], str, float]]:
        """Boxes of one colour's blobs, each with its shape and how surely it is that."""
        cv2 = _cv2()
        outlines, _ = cv2.findContours(colour_mask(picture, colour), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        found = []
        for outline in outlines:
            left, top, width, height = cv2.boundingRect(outline)
            own = np.zeros((height, width), np.uint8)
            cv2.drawContours(own, [outline - (left, top)], -1, 1, cv2.FILLED)
            hull = np.zeros_like(own)
            cv2.fillConvexPoly(hull, cv2.convexHull(outline) - (left, top), 1)
            if (area := int(own.sum())) >= self.smallest:
                shape, confidence = told_apart(area / own.size, area / int(hull.sum()))
                found.append(((left, top, left + width, top + height), shape, confidence))
        return found


def told_apart(fill: float, hull_fill: float) -> tuple[str, float]:
    """The shape of a blob, and how surely it is that.

    fill: the share of its bounding box that it covers; hull_fill: of its convex hull.
    """
    if hull_fill < CROSS:
        return "cross", min(1.0, (CROSS - hull_fill) / 0.1)
    ideal = {shape: abs(fill - value) for shape, value in FILLS.items() if shape != "cross"}
    (shape, off), (_, second) = sorted(ideal.items(), key=lambda item: item[1])[:2]
    return shape, float(1 - off / second) if second else 0.0


def colour_mask(picture: Picture, colour: str) -> NDArray[np.uint8]:
    """Where a picture shows a colour, [height, width], 0 or 255."""
    cv2 = _cv2()
    hsv = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2HSV)
    if colour == "white":
        mask: NDArray[np.uint8] = cv2.inRange(hsv, (0, 0, 170), (180, PALE, 255))
        return mask
    first, last = HUES[colour]
    if first <= last:
        return np.asarray(cv2.inRange(hsv, (first, SATURATED, BRIGHT), (last, 255, 255)))
    above = cv2.inRange(hsv, (first, SATURATED, BRIGHT), (180, 255, 255))
    return np.asarray(above | cv2.inRange(hsv, (0, SATURATED, BRIGHT), (last, 255, 255)))


def read_phrase(phrase: str) -> tuple[str | None, str | None]:
    """The colour and the shape that a phrase names, None for any: "red triangle", "a red thing", "triangles".

    Raises ValueError, with what can be read, for other phrases.
    """
    words = [word for word in re.findall(r"[a-z]+", phrase.lower()) if word not in ("a", "an", "the")]
    colour = words.pop(0) if words and words[0] in COLOURS else None
    singular = re.sub(r"(?<=cross)es$|(?<!s)s$", "", words[0]) if len(words) == 1 else None
    if (singular is None and words) or (singular and singular not in (*SHAPES, *THINGS)) or not (colour or singular):
        raise ValueError(
            f"colour-shape cannot read {phrase!r}; it sees {', '.join(COLOURS)} and {', '.join(SHAPES)}, e.g. "
            '"red triangle", "red thing" or "triangle"'
        )
    return colour, singular if singular in SHAPES else None


def _cv2() -> Any:
    try:
        return import_module("cv2")
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f'colour-shape needs OpenCV, which cannot be imported ({error}); install it: pip install "mmaccel[video]"'
        ) from error
