"""What a bench of policies compares: methods by name and share of the visual tokens; how far chunks are executed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmaccel.bench import as_list
from mmaccel.methods import Method, get_method

LAYER = 2  # before which methods inside the decoder cut; pocket-vla has four layers


@dataclass(frozen=True)
class Setting:
    """A decoration of the policy, and how many actions of a chunk are executed (None: as many as the policy says)."""

    name: str
    methods: tuple[Method, ...] = ()
    execute: int | None = None

    @classmethod
    def of(cls, name: str) -> Setting:
        """Reads "dense", "METHOD.PERCENT", e.g. "vla-pruner.25", or "execute.N", the dense policy.

        A percentage is what stays of the visual tokens: at the cut, for methods inside the decoder that have
        `kept_share`; before the language model, for the others.  Raises ValueError for other names.
        """
        kind, _, number = name.partition(".")
        if name == "dense":
            return cls(name)
        try:
            value = float(number)
        except ValueError:
            raise ValueError(
                f"a setting is dense, METHOD.PERCENT (vla-pruner.25) or execute.N (execute.8); got {name!r}"
            ) from None
        if kind == "execute":
            return cls(name, execute=int(value))
        method = get_method(kind)
        options: dict[str, Any] = {"budget": value / 100}
        if hasattr(method, "kept_share"):
            options = {"kept_share": value / 100, "layer": LAYER}
        if hasattr(method, "window"):  # of about six calls in an episode, a longer memory would leave few to prune
            options["window"] = 1
        return cls(name, (method.from_dict(options),))


def settings(names: str) -> list[Setting]:
    """Those of a list with commas; the first is dense, which the others are compared with."""
    return [Setting.of(name) for name in dict.fromkeys(["dense", *as_list(names)])]
