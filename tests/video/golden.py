"""Inputs and outputs of the official implementations, as they lie in tests/golden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

FOLDER = Path(__file__).parents[1] / "golden"


def load_json(name: str) -> Any:
    """One golden JSON file."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def load_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of one golden file."""
    return load_file(FOLDER / f"{name}.safetensors")
