"""Train the pocket models again: `train("pocket-clip", folder)`, then pocket-llava, then pocket-llava-next.

Each later model reads the earlier ones from the same folder, or else the shipped ones. On two CPU cores they take half
an hour each.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmaccel import pocket

TRAINABLE = ("pocket-clip", "pocket-llava", "pocket-llava-next")


def train(name: str, out_dir: Path | str, steps: int | None = None, resume: bool = True) -> Path:
    """Train a pocket model and write its checkpoint; prints the figures that it reaches.

    out_dir: gets `NAME/STAGE/checkpoint.pt` and `NAME/STAGE/log.jsonl` while training, and `NAME/weights` at the end,
    which is returned.  steps: of each stage, in place of the recipe's.  resume: go on from the checkpoint there.
    Raises ValueError for a name without a training script.
    """
    if name not in TRAINABLE:
        raise ValueError(f"{name!r} cannot be trained here; {', '.join(TRAINABLE)} can.")
    from mmaccel.pocket.train import clip, figures, llava, llava_next
    from mmaccel.pocket.train.common import fit, save

    module: Any = {"pocket-clip": clip, "pocket-llava": llava, "pocket-llava-next": llava_next}[name]
    out_dir = Path(out_dir)
    earlier = [load(other, out_dir) for other in TRAINABLE[: TRAINABLE.index(name)]]
    run = module.Run(*earlier)
    for stage in run.stages():
        recipe = stage.recipe if steps is None else replace(stage.recipe, steps=steps)
        fit(run, replace(stage, recipe=recipe), out_dir / name / stage.name, resume)
    weights = out_dir / name / "weights"
    save(run.model, module.make_processor(), weights)
    print(json.dumps({name: figures.of(name, weights)}), flush=True)
    return weights


def load(name: str, out_dir: Path) -> Any:
    """A model trained in this folder, or else the shipped one."""
    from transformers import AutoModel, AutoModelForImageTextToText

    trained = out_dir / name / "weights"
    kind: Any = AutoModel if name == "pocket-clip" else AutoModelForImageTextToText
    return kind.from_pretrained(trained if trained.exists() else pocket.path(name)).eval()
