"""Inputs and outputs of the official implementations, as they lie in tests/golden."""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"


def load(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one golden file, and the exact numbers in its metadata."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
