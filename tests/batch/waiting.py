"""Waiting for a run that another process does."""

from __future__ import annotations

import time
from pathlib import Path

from tests.batch.toys import outputs


def wait_for_outputs(out: Path, more_than: int = 0, seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while not ((out / "outputs").exists() and len(outputs(out)) > more_than):
        assert time.monotonic() < deadline, "nothing was done"
        time.sleep(0.02)
