"""Small models trained on a procedural world, shipped as ordinary checkpoints of unmodified classes.

>>> from transformers import AutoProcessor, LlavaForConditionalGeneration
>>> model = LlavaForConditionalGeneration.from_pretrained(path("pocket-llava"))
>>> processor = AutoProcessor.from_pretrained(path("pocket-llava"))

The checkpoints hold float16 weights and are computed in float32 unless you say otherwise.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"


def names() -> list[str]:
    """The pocket models that this installation holds, sorted."""
    return sorted(folder.name for folder in _WEIGHTS.glob("*") if (folder / "config.json").exists())


def path(name: str) -> Path:
    """The folder of a pocket model, for `from_pretrained`.

    Raises ValueError for an unknown name, with the nearest one.
    """
    if name not in names():
        nearest = get_close_matches(name, names(), n=1, cutoff=0.3)
        mend = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"there is no pocket model {name!r}; there are {', '.join(names()) or 'none'}.{mend}")
    return _WEIGHTS / name


__all__ = ["names", "path"]
