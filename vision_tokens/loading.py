"""Checkpoint folders and pictures from disk: what is wrong with one is said by name, with the mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from mmaccel.checkpoints import find_folder, first_line, load_part, load_weights
from mmaccel.methods import Unsupported


def load(model: str | Path) -> tuple[Any, Any]:
    """The model, in float32 on the CPU and in evaluation mode, and its processor.

    model: a transformers checkpoint folder of a supported family, or the name of a pocket model.  Weights are read
    from safetensors only, and no code of the folder is run.
    Raises FileNotFoundError, `Unsupported` or ValueError that names the folder, what is wrong, and the mend.
    """
    from transformers import AutoModelForImageTextToText

    folder = find_folder(model)
    _check_family(folder)
    processor = _load_processor(folder)
    return load_weights(AutoModelForImageTextToText, folder), processor


def _check_family(folder: Path) -> None:
    from vision_tokens.families import FAMILIES

    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is no JSON object ({error}); copy the folder again") from None
    if kind not in FAMILIES:
        raise Unsupported(
            f"{folder}: visual tokens of the family {kind!r} are not supported; supported: "
            f"{', '.join(sorted(FAMILIES))}. CONTRIBUTING.md shows how to add a family"
        )


def _load_processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    processor = load_part(AutoProcessor, folder)
    if not hasattr(processor, "image_processor") or getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"{folder}: a question needs a processor with an image processor and a chat template; got a "
            f"{type(processor).__name__} that lacks one. Save the model's own with processor.save_pretrained(folder)"
        )
    return processor


def open_picture(file: str | Path) -> Image.Image:
    """The picture in a file, RGB and upright.  Raises FileNotFoundError or ValueError that names the file."""
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no picture {str(file)!r}; give a PNG or JPEG file")
    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{file} cannot be read as a picture ({first_line(error)}); save it again as PNG or JPEG"
        ) from None
