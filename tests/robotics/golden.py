"""Inputs and outputs of the official implementations, as they lie in tests/golden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"


def load(name: str) -> tuple[dict[str, Tensor], Any]:
    """The tensors of one golden file, and the JSON beside it."""
    return load_file(FOLDER / f"{name}.safetensors"), json.loads((FOLDER / f"{name}.json").read_text())
