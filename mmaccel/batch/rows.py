"""Rows of a job file, JSONL, CSV or Parquet, one at a time: plain data, with the line that each stands on."""

from __future__ import annotations

import csv
import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ENDINGS = (".jsonl", ".csv", ".parquet")


def read_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    """Every row with its line (in Parquet its number, from 1); a row that cannot be read is a text that says why.

    A cell of a CSV or Parquet file that is a JSON list or object is read as one; an empty cell is no value.
    Raises FileNotFoundError, ValueError for another kind of file, ImportError if Parquet lacks its library.
    """
    return {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[_ending(path)](path)


def count_rows(path: Path) -> int:
    """How many rows a job file holds, without looking at what they say; raises as `read_rows` does."""
    if _ending(path) == ".parquet":
        return int(_opened(path).metadata.num_rows)
    if path.suffix.lower() == ".jsonl":
        with path.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
        return max(0, sum(1 for row in csv.reader(lines) if row) - 1)


def _ending(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"there is no job file {str(path)!r}; give a {', '.join(ENDINGS)} file")
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"a job file ends in {', '.join(ENDINGS)}; got {path.name!r}")
    return path.suffix.lower()


def _jsonl(path: Path) -> Iterator[tuple[int, Row | str]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _object(line.removeprefix(BOM_UTF8))


def _object(line: bytes) -> Row | str:
    try:
        row = DECODER.decode(line.decode())
    except json.JSONDecodeError as error:
        return f"this is no JSON object: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # ours, bad UTF-8, nesting without end
        return f"this is no JSON object: {error}"
    return row if isinstance(row, dict) else f'a row is a JSON object, e.g. {{"task": "answer"}}; got {row!r:.80}'


def _once(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in row if names.count(name) > 1)!r} is given twice")
    return row


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number)


def _csv(path: Path) -> Iterator[tuple[int, Row | str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines, strict=True)
            names = next(reader, [])
            if len(set(names)) < len(names):
                yield 1, f"two columns have the same name: {', '.join(names)}"
                return
            for cells in reader:
                if cells and len(cells) != len(names):
                    yield reader.line_num, f"{len(cells)} cells, and the first line names {len(names)} columns"
                elif cells:
                    yield reader.line_num, {name: _cell(text) for name, text in zip(names, cells, strict=True) if text}
    except (csv.Error, UnicodeDecodeError) as error:
        yield 0, f"the file cannot be read from here on ({error}); save it as CSV in UTF-8"


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return DECODER.decode(value)
        except (ValueError, RecursionError):
            return value
    return value


def _parquet(path: Path) -> Iterator[tuple[int, Row | str]]:
    number = 0
    for part in _opened(path).iter_batches(batch_size=1000):
        for row in part.to_pylist():
            number += 1
            yield number, {name: _cell(value) for name, value in row.items() if value not in (None, "")}


def _opened(path: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(
            f"{path.name}: Parquet files need pyarrow ({error}): pip install 'mmaccel[batch]', or use .jsonl"
        ) from None
    try:
        return ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file ({error}); write it again, or use .jsonl") from None
