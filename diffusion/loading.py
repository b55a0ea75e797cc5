"""Pipelines from disk: what is wrong with a folder is said by name, with the mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmaccel.checkpoints import find_folder


def load(model: str | Path) -> tuple[Any, None]:
    """The pipeline, in float32 on the CPU; there is no processor.

    model: a folder that `pipeline.save_pretrained` wrote, or the name of a pocket model.  Weights are read from
    safetensors only, and no code of the folder is run.
    Raises FileNotFoundError or ValueError that names the folder, what is wrong, and the mend.
    """
    import torch
    from diffusers import DiffusionPipeline

    folder = find_folder(model, "pipeline")
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
