"""The ledger as a table: Parquet, CSV or JSONL."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mmaccel.batch.ledger import Ledger

Rows = Iterator[Sequence[Any]]
CHUNK = 10_000  # rows in memory at a time


def write_export(folder: Path, file: Path) -> int:
    """Writes every job of a run as a row, into a temporary file that is then moved to its name.

    Returns how many rows there are.  Raises ValueError for another ending, ImportError if Parquet lacks its library.
    """
    writers: dict[str, Callable[[Path, Sequence[str], Rows], int]] = {
        ".parquet": _parquet,
        ".csv": _csv,
        ".jsonl": _jsonl,
    }
    if file.suffix not in writers:
        raise ValueError(f"an export ends in {', '.join(writers)}; got {file.name!r}")
    unfinished = file.with_name(f".{file.name}.partial")
    try:
        with Ledger.read(folder) as ledger:
            rows = writers[file.suffix](unfinished, *ledger.export())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return rows


def _csv(file: Path, columns: Sequence[str], rows: Rows) -> int:
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer, total = csv.writer(opened), 0
        writer.writerow(columns)
        for row in rows:
            writer.writerow(row)
            total += 1
    return total


def _jsonl(file: Path, columns: Sequence[str], rows: Rows) -> int:
    with file.open("w", encoding="utf-8") as opened:
        total = 0
        for row in rows:
            opened.write(json.dumps(dict(zip(columns, row, strict=True))) + "\n")
            total += 1
    return total


def _parquet(file: Path, columns: Sequence[str], rows: Rows) -> int:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError as error:
        raise ImportError(f"Parquet needs pyarrow ({error}): pip install 'mmaccel[batch]', or export .csv") from None
    whole = {"number", "line", "attempts", "together", "seed"}
    real = {"seconds", "finished"}
    kinds = {name: pyarrow.int64() if name in whole else pyarrow.float64() if name in real else pyarrow.string()
             for name in columns}  # fmt: skip
    schema, total = pyarrow.schema(kinds), 0
    with ParquetWriter(file, schema) as writer:
        while chunk := list(islice(rows, CHUNK)):
            writer.write_table(
                pyarrow.table(dict(zip(columns, map(list, zip(*chunk, strict=True)), strict=True)), schema)
            )
            total += len(chunk)
    return total
