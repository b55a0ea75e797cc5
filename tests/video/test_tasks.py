"""The batch task `keyframes` finds what the command finds."""

from __future__ import annotations

import json

from PIL import Image

from video import KeyframeSearch
from video.film import Film
from video.finding import find_keyframes
from video.tasks import FindKeyframes


def test_frames_sheet_and_facts_are_those_of_the_search(haystack, tmp_path):
    target = haystack.events[0].target.name
    job = FindKeyframes(video=str(haystack.path), find=[target], near=["white thing"])
    (report,) = FindKeyframes.run(None, [KeyframeSearch("bolt", frames=3)], [job], [0], [tmp_path / "0"])
    with Film(haystack.path) as film:
        found = find_keyframes(film, "bolt", "colour-shape", [target], ["white thing"], frames=3)
    assert json.loads((tmp_path / "0.json").read_text()) == report == json.loads(json.dumps(found.facts))
    assert Image.open(tmp_path / "0.png").width == 3 * 240
