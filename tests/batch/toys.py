"""Job files of toys, the command on them, and what an output folder then holds."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PLUGIN = Path(__file__).parent / "plugin"
HOUSE = Path(__file__).parents[2]
BEGUN: list[subprocess.Popen[str]] = []
COMMAND = [sys.executable, "-c", "from mmaccel.cli import main; main()", "batch"]


def toy(number: int, **more: Any) -> dict[str, Any]:
    return {"task": "toy", "text": f"toy {number}", "seed": number, "output": f"part-{number % 7}/{number}", **more}


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{PLUGIN}{os.pathsep}{HOUSE}", "OMP_NUM_THREADS": "1"}


def begin(*arguments: object) -> subprocess.Popen[str]:
    """The command in a process group of its own, which can be killed with all workers, and is when the test ends."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    BEGUN.append(process)
    return process


def end_all() -> None:
    """Kills the commands that a test began and that still run."""
    while BEGUN:
        process = BEGUN.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def batch(*arguments: object, seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
    process = begin(*arguments)
    said, complained = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(process.args, process.returncode, said, complained)


def outputs(out: Path) -> dict[str, bytes]:
    """Every output file and what is in it."""
    folder = out / "outputs"
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def ledger(out: Path) -> list[dict[str, Any]]:
    """Every job, as its ledger has it, once SQLite has found the file sound."""
    database = sqlite3.connect(out / "ledger.sqlite")
    database.row_factory = sqlite3.Row
    assert database.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    rows = [dict(row) for row in database.execute("SELECT * FROM jobs ORDER BY number")]
    database.close()
    return rows


def hashes(out: Path) -> list[tuple[str, str, str]]:
    """The key, the name and the hash of every output."""
    return [(row["key"], row["output"], row["output_hash"]) for row in ledger(out)]
