"""Pipelines from disk: what is wrong with a folder is said by name, with the mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmaccel import pocket
from mmaccel.registry import suggest


def load(model: str | Path) -> tuple[Any, None]:
    """The pipeline, in float32 on the CPU; there is no processor.

    model: a folder that `pipeline.save_pretrained` wrote, or the name of a pocket model.  Weights are read from
    safetensors only, and no code of the folder is run.
    Raises FileNotFoundError or ValueError that names the folder, what is wrong, and the mend.
    """
    import torch
    from diffusers import DiffusionPipeline

    folder = find_folder(model)
    try:
        parts = json.loads((folder / "model_index.json").read_text())
        # diffusers 0.42 writes down that a part is None, and then misses it
        none = {name: None for name, part in parts.items() if part == [None, None]}
        pipeline = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, **none
        )
    except (AttributeError, OSError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0][:300]
        raise ValueError(f"{folder}: the pipeline cannot be read ({first}); copy the folder again") from None
    return pipeline, None


def find_folder(model: str | Path) -> Path:
    """The folder of a pipeline; a pocket model's name stands for its own.  Raises FileNotFoundError."""
    folder = Path(model)
    if not folder.is_dir():
        if str(model) not in pocket.names():
            raise FileNotFoundError(
                f"there is no pipeline {str(model)!r}; give a folder that pipeline.save_pretrained wrote, or a pocket "
                f"model; {suggest(str(model), pocket.names())}"
            )
        folder = pocket.path(str(model))
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model_index.json, so it is no pipeline; give the folder that pipeline.save_pretrained "
            "wrote, not one above or below it"
        )
    return folder
