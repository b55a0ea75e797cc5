"""Autoregressive image models from disk: what is wrong with a folder is said by name, with the mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmaccel.checkpoints import find_folder, load_weights


def load(model: str | Path) -> tuple[Any, None]:
    """The model, in float32 on the CPU; there is no processor.

    model: a folder that `save_pretrained` wrote, or the name of a pocket model.
    Raises FileNotFoundError or ValueError that names the folder, what is wrong, and the mend.
    """
    import json

    folder = find_folder(model)
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind == "mar":
        from diffusion.autoregressive.modeling import MARModel

        return load_weights(MARModel, folder), None
    from transformers import AutoModelForCausalLM, ImageGPTForCausalImageModeling

    return load_weights(ImageGPTForCausalImageModeling if kind == "imagegpt" else AutoModelForCausalLM, folder), None
