"""Small models trained on a procedural world, shipped as ordinary checkpoints of unmodified classes.

>>> from transformers import AutoProcessor, LlavaForConditionalGeneration
>>> model = LlavaForConditionalGeneration.from_pretrained(path("pocket-llava"))
>>> processor = AutoProcessor.from_pretrained(path("pocket-llava"))

Models that draw are whole pipelines, with the settings that suit them beside:

>>> from diffusers import StableDiffusion3Pipeline
>>> pipeline = StableDiffusion3Pipeline.from_pretrained(path("pocket-flow"))
>>> picture = pipeline("a red circle, two blue squares", **call_defaults("pocket-flow")).images[0]

The checkpoints hold float16 weights and are computed in float32 unless you say otherwise.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

_WEIGHTS = Path(__file__).parent / "weights"


def names() -> list[str]:
    """The pocket models that this installation holds, sorted."""
    kinds = ("config.json", "model_index.json")  # of a model, of a pipeline
    return sorted({file.parent.name for kind in kinds for file in _WEIGHTS.glob(f"*/{kind}")})


def path(name: str) -> Path:
    """The folder of a pocket model, for `from_pretrained`.

    Raises ValueError for an unknown name, with the nearest one.
    """
    if name not in names():
        nearest = get_close_matches(name, names(), n=1, cutoff=0.3)
        mend = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"there is no pocket model {name!r}; there are {', '.join(names()) or 'none'}.{mend}")
    return _WEIGHTS / name


def size(name: str) -> int:
    """Bytes of all files of a pocket model, its components' folders included."""
    return sum(file.stat().st_size for file in path(name).rglob("*") if file.is_file())


def call_defaults(name: str) -> dict[str, Any]:
    """Settings for the call of a pocket pipeline, such as its guidance scale; empty for models that have none."""
    file = path(name) / "call.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


__all__ = ["call_defaults", "names", "path", "size"]
