"""transformers checkpoints from disk: safetensors only, no code of a folder is run, what is wrong is said by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmaccel import pocket
from mmaccel.registry import suggest


def find_folder(model: str | Path, what: str = "model") -> Path:
    """The folder of a "model" or a "pipeline"; a pocket model's name stands for its own.  Raises FileNotFoundError."""
    folder, index = Path(model), "model_index.json" if what == "pipeline" else "config.json"
    if not folder.is_dir():
        if str(model) not in pocket.names():
            raise FileNotFoundError(
                f"there is no {what} {str(model)!r}; give a folder that {what}.save_pretrained wrote, or a pocket "
                f"model; {suggest(str(model), pocket.names())}"
            )
        folder = pocket.path(str(model))
    if not (folder / index).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {index}; give the folder that {what}.save_pretrained wrote, not one above or below it"
        )
    return folder


def load_weights(auto_class: Any, folder: Path, unused: tuple[str, ...] = ()) -> Any:
    """A transformers model in float32 on the CPU, for evaluation, from safetensors and without code from the folder.

    unused: beginnings of the names of weights that may be missing, because nobody reads what they compute.
    Raises FileNotFoundError or ValueError that names the folder, what is wrong, and the mend.
    """
    import torch
    from safetensors import SafetensorError

    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} holds no .safetensors file, and other formats are not read; save the weights with "
            "model.save_pretrained(folder)"
        )
    try:
        model, found = auto_class.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: the weights cannot be read ({first_line(error)}); copy the folder again") from None
    if missing := sorted(key for key in found["missing_keys"] if not key.startswith(unused)):
        raise ValueError(
            f"{folder}: {len(missing)} weights are missing, e.g. {missing[0]}, and would be random; "
            "copy the folder again"
        )
    return model.eval()


def load_part(auto_class: Any, folder: Path) -> Any:
    """A checkpoint's processor, image processor or tokenizer.  Raises ImportError or ValueError with the mend."""
    try:
        return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise ImportError(
            f"{folder}: its processor needs a library that is not installed ({first_line(error)}); those of some "
            "families, the Qwen ones among them, need torchvision, of the same build as torch"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder}: its processor cannot be read ({first_line(error)}); save it there with "
            "processor.save_pretrained(folder)"
        ) from None


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
