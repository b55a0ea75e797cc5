"""The models that the page may name: the pocket models, and what lies in the folders that its command was given."""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmaccel import pocket
from mmaccel.registry import suggest

KEPT = 4  # models that stay loaded


class Shelf:
    """Checkpoints by name; each is loaded once, and every run gets a twin of its own.

    folders: checkpoints, or folders of some.  Names from outside them are refused, whatever links lead there.
    """

    def __init__(self, folders: Sequence[Path] = ()) -> None:
        self.folders = [folder.resolve() for folder in folders]
        self._loaded: OrderedDict[tuple[Any, Path], Any] = OrderedDict()
        self._lock = threading.Lock()

    def names(self, suits: Callable[[Path], bool]) -> list[str]:
        """The names of the models whose folder suits: pocket models first."""
        known = {name: pocket.path(name) for name in pocket.names()} | self._checkpoints()
        return [name for name, folder in known.items() if suits(folder)]

    def folder(self, name: str) -> Path:
        """The folder of a model by its name or its path.  Raises ValueError for what is not offered."""
        known = self._checkpoints()
        if name in pocket.names():
            return pocket.path(name)
        for folder in known.values():
            if name and Path(name).resolve() == folder:
                return folder
        if name not in known:
            raise ValueError(
                f"there is no model {name!r} here; {suggest(name, [*pocket.names(), *known])}. Others are offered if "
                "`mmaccel app` is started with --models FOLDER"
            )
        return known[name]

    def twin(self, name: str, load: Callable[[Path], Any]) -> Any:
        """What `load` makes of a model's folder, as objects of this run's own, whose weights all runs share.

        So no run sees another's methods or reports, and one that is abandoned leaves nothing behind.
        """
        key = (load, self.folder(name))
        with self._lock:
            if key not in self._loaded:
                self._loaded[key] = load(key[1])
            self._loaded.move_to_end(key)
            while len(self._loaded) > KEPT:
                self._loaded.popitem(last=False)
            return twin(self._loaded[key])

    def _checkpoints(self) -> dict[str, Path]:
        found = {}
        for root in self.folders:
            for folder in (root, *sorted(root.iterdir())):
                if kind_of(folder) and folder.resolve().is_relative_to(root):
                    found[folder.name] = folder.resolve()
        return found


def kind_of(folder: Path) -> str | None:
    """A checkpoint's `model_type`, "pipeline" for a pipeline, None for other folders."""
    try:
        if (folder / "model_index.json").is_file():
            return "pipeline"
        return str(json.loads((folder / "config.json").read_text())["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def twin(thing: Any) -> Any:
    """A copy that shares all tensors."""
    import torch

    modules = [part for part in _parts(thing) if isinstance(part, torch.nn.Module)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return copy.deepcopy(thing, {id(tensor): tensor for tensor in tensors})


def _parts(thing: Any) -> list[Any]:
    if isinstance(thing, tuple):
        return [part for one in thing for part in _parts(one)]
    return [thing, *getattr(thing, "components", {}).values()]
