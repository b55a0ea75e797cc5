"""Models inside rewards: found by folder, loaded at the first call, shared by all rewards with the same settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

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
