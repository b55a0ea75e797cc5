"""Models inside rewards: found by folder, loaded at the first call, shared by all rewards with the same settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import torch

from mmaccel import pocket
from mmaccel.registry import suggest

T = TypeVar("T")

_loaded: dict[tuple[Any, ...], Any] = {}
_lock = RLock()


def shared(load: Callable[..., T], *settings: Any) -> T:
    """`load(*settings)`, once per process, whichever reward or thread asks first."""
    key = (load, *settings)
    with _lock:
        if key not in _loaded:
            _loaded[key] = load(*settings)
        found: T = _loaded[key]
    return found


def release_models() -> int:
    """Forgets all models that rewards have loaded, to give their memory back; says how many.

    A reward that is called again loads its model again.
    """
    with _lock:
        count = len(_loaded)
        _loaded.clear()
    return count


def find_folder(reward: str, model: str) -> Path:
    """The folder of a checkpoint; a pocket model's name stands for its own.  Raises FileNotFoundError with the mend."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{reward}: {folder} holds no config.json; give the folder that model.save_pretrained wrote"
            )
        return folder.resolve()
    if model in pocket.names():
        return pocket.path(model)
    raise FileNotFoundError(
        f"{reward}: there is no checkpoint folder {model!r}. Nothing is downloaded here: fetch it with "
        "huggingface_hub.snapshot_download and give the folder, or name a pocket model; "
        + suggest(model, pocket.names())
    )


def model_type(folder: Path) -> str:
    """The family of a checkpoint, as its config.json says."""
    try:
        return str(json.loads((folder / "config.json").read_text())["model_type"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'config.json'} names no model_type; copy the folder again") from None


def load_weights(auto_class: Any, folder: Path, device: torch.device, unused: tuple[str, ...] = ()) -> Any:
    """A transformers model in float32 on `device`, from safetensors and without code from the folder.

    unused: beginnings of the names of weights that may be missing, because nobody reads what they compute.
    Raises FileNotFoundError or ValueError that names the folder, what is wrong, and the mend.
    """
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
    return model.eval().requires_grad_(False).to(device)


def load_part(auto_class: Any, folder: Path) -> Any:
    """A checkpoint's processor, image processor or tokenizer.  Raises ImportError or ValueError with the mend."""
    try:
        return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise ImportError(
            f"{folder}: its processor needs a library that is not installed ({first_line(error)}); those of some "
            "families need torchvision, of the same build as torch"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder}: its processor cannot be read ({first_line(error)}); save it there with "
            "processor.save_pretrained(folder)"
        ) from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
