"""Values for the settings that have no default."""

from typing import Any

from mmaccel import Method

VALUES = {
    "draft": "path/to/draft",
    "reward": {"reward": "brightness"},
    "trail": {"seed": 1, "chain": 0, "moves": [], "turns": [], "sampled": True, "start": None},
}


def required(cls: type[Method]) -> dict[str, Any]:
    """What a method has to be told beside its name."""
    return {name: VALUES[name] for name in cls.json_schema().get("required", ())}
