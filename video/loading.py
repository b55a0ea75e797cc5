"""Processors from checkpoint folders, for the command line."""

from __future__ import annotations

from typing import Any

from mmaccel.checkpoints import find_folder, load_part


def load(model: str) -> tuple[Any, Any]:
    """The processor of a checkpoint folder or a pocket model, twice: as the target, and as what prepares its inputs."""
    from transformers import AutoProcessor

    processor = load_part(AutoProcessor, find_folder(model))
    return processor, processor
