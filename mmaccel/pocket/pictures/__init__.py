"""The pictures that come with the pocket models: held-out scenes, each with questions and their answers.

`python -m mmaccel.pocket.pictures` draws them again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Picture:
    """A PNG file, the pocket model that it is made for, and questions with their one right answer."""

    file: Path
    model: str
    questions: tuple[tuple[str, str], ...]


def pictures(model: str | None = None) -> list[Picture]:
    """The pictures, of one pocket model or of all, in the order that they are listed in."""
    listed = json.loads((FOLDER / "pictures.json").read_text())
    found = [
        Picture(FOLDER / name, entry["model"], tuple((question, answer) for question, answer in entry["questions"]))
        for name, entry in listed.items()
    ]
    return [picture for picture in found if model in (None, picture.model)]
