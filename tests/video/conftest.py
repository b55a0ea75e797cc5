"""A small pocket haystack that the room's tests share."""

from __future__ import annotations

import pytest

from video.pocket_haystack import PocketHaystack, make


@pytest.fixture(scope="session")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> PocketHaystack:
    return make(tmp_path_factory.mktemp("haystack") / "haystack.mp4", 120, seed=0, events=4, cue_seconds=30)
