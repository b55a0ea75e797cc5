"""Train the pocket models again: `train("pocket-clip", folder)`, then those that need it.

Each later model reads the earlier ones from the same folder, or else the shipped ones. On two CPU cores they take half
an hour each.  A room that brings a class of models brings their training, too: a module under the entry-point group
`mmaccel.trainings`, with `NEEDED` (the models that it starts from), `Run`, and `figures(weights)`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from mmaccel import pocket
from mmaccel.registry import entries

GROUP = "mmaccel.trainings"
NEEDED = {  # the models that each starts from; a module of this package trains each
    "pocket-clip": (),
    "pocket-llava": ("pocket-clip",),
    "pocket-llava-next": ("pocket-clip", "pocket-llava"),
    "pocket-flow": ("pocket-clip",),
    "pocket-turbo": ("pocket-clip", "pocket-flow"),
    "pocket-ddim": ("pocket-clip", "pocket-flow"),
    "pocket-video": ("pocket-clip", "pocket-ddim"),
}


def trainable() -> list[str]:
    """The names of all pocket models that can be trained here, ours and those of other rooms."""
    return sorted({*NEEDED, *entries(GROUP)})


def train(name: str, out_dir: Path | str, steps: int | None = None, resume: bool = True) -> Path:
    """Train a pocket model and write its checkpoint; prints the figures that it reaches.

    out_dir: gets `NAME/STAGE/checkpoint.pt` and `NAME/STAGE/log.jsonl` while training, and `NAME/weights` at the end,
    which is returned.  steps: of each stage, in place of the recipe's.  resume: go on from the checkpoint there.
    Raises ValueError for a name without a training script.
    """
    if name not in trainable():
        raise ValueError(f"{name!r} cannot be trained here; {', '.join(trainable())} can.")
    from mmaccel.pocket.train import figures
    from mmaccel.pocket.train.common import fit

    if name in entries(GROUP):
        module: Any = entries(GROUP)[name].load()
        needed, measure = module.NEEDED, module.figures
    else:
        module = import_module("mmaccel.pocket.train." + name.removeprefix("pocket-").replace("-", "_"))
        needed, measure = NEEDED[name], partial(figures.of, name)
    out_dir = Path(out_dir)
    run = module.Run(*(load(other, out_dir) for other in needed))
    for stage in run.stages():
        recipe = stage.recipe if steps is None else replace(stage.recipe, steps=steps)
        fit(run, replace(stage, recipe=recipe), out_dir / name / stage.name, resume)
    weights = out_dir / name / "weights"
    run.save(weights)
    print(json.dumps({name: measure(weights)}), flush=True)
    return weights


def load(name: str, out_dir: Path) -> Any:
    """A model, or pipeline, trained in this folder, or else the shipped one."""
    trained = out_dir / name / "weights"
    folder = trained if trained.exists() else pocket.path(name)
    if (folder / "model_index.json").exists():
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(folder)
    from transformers import AutoModel, AutoModelForImageTextToText

    kind: Any = AutoModel if name == "pocket-clip" else AutoModelForImageTextToText
    return kind.from_pretrained(folder).eval()
