"""What a job is known by: hashes of plain data, of files and folders, and the versions that results depend on."""

from __future__ import annotations

import hashlib
import json
import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmaccel.registry import entries

WHOLE = 8 * 2**20  # bytes of a file that is read to its end
SAMPLE = 2**20  # bytes read at the start, in the middle and at the end of a larger one
PACKAGES = ("mmaccel", "torch", "transformers", "diffusers", "tokenizers", "safetensors", "numpy", "pillow", "av")
ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def digest(data: Any) -> str:
    """The SHA-256 of plain data, the same for equal data."""
    return hashlib.sha256(ENCODER.encode(data).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """What a file of inputs is known by: its size and its bytes; of more than 8 MiB a mebibyte at three places."""
    with path.open("rb") as opened:
        size = path.stat().st_size
        found = hashlib.sha256(str(size).encode())
        for place in (0,) if size <= WHOLE else (0, size // 2, size - SAMPLE):
            opened.seek(place)
            found.update(opened.read(WHOLE if size <= WHOLE else SAMPLE))
    return found.hexdigest()


@lru_cache(maxsize=1024)
def folder_fingerprint(folder: Path) -> str:
    """What a checkpoint folder is known by: the names and fingerprints of its files."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return digest([[file.relative_to(folder).as_posix(), fingerprint(file)] for file in files])


def versions(tasks: list[str], device: str, threads: int) -> dict[str, str]:
    """What results depend on beside the jobs: packages, those that bring the tasks included, device and threads."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "device": device}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    for task in tasks:
        if (brought := entries("mmaccel.tasks")[task].dist) is not None:
            found[brought.name] = brought.version
    return {**found, "threads": str(threads)}
