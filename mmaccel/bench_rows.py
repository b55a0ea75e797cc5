"""Rows of a bench: made once, written down as they come, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def kept_rows(
    name: str, count: int, folder: Path | None, make: Callable[[Sequence[int]], Iterable[Row]], key: str = "pair"
) -> list[Row]:
    """Rows 0 to count - 1, from the file of this name in `folder` or made now and written there.

    make: the rows of some numbers, in their order; each is written down as it comes.  key: holds a row's number.
    """
    file = folder / f"{name}.jsonl" if folder else None
    known = _read(file, count, key)
    missing = [number for number in range(count) if number not in known]
    for number, row in zip(missing, make(missing) if missing else (), strict=True):
        known[number] = {key: number, **row}
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as lines:
                lines.write("\n" + json.dumps(known[number]))  # first the end of a line that was cut off
    return [known[number] for number in range(count)]


def _read(file: Path | None, count: int, key: str) -> dict[int, Row]:
    """The rows of earlier runs, but for lines that a killed run left unfinished."""
    if file is None or not file.exists():
        return {}
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
    return {row[key]: row for row in rows if row[key] < count}
