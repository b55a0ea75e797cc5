"""What a bench of policies compares: methods, and what they keep of the visual tokens or execute of a chunk."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import mmaccel
from mmaccel.bench import as_list
from mmaccel.methods import Method, get_method
from robotics.chunk_methods import ChunkMethod
from robotics.policies import Policy
from vision_tokens.decoder_layers import OneCutMethod

LAYER = 2  # before which methods inside the decoder cut; pocket-vla has four layers


@dataclass(frozen=True)
class Setting:
    """A decoration of a policy; none for the dense one."""

    name: str
    methods: tuple[Method, ...] = ()

    @classmethod
    def of(cls, name: str) -> Setting:
        """Reads "dense", METHOD.PERCENT, e.g. "vla-pruner.25", or METHOD.NUMBER, e.g. "fixed-horizon.6".

        A percentage is what stays of the visual tokens: at the cut, for methods that drop tokens once, inside
        the decoder; before the language model, for the others.  Methods that work on chunks are given the least
        number of actions to execute.  Raises ValueError for other names.
        """
        kind, _, number = name.partition(".")
        if name == "dense":
            return cls(name)
        try:
            value = float(number)
        except ValueError:
            raise ValueError(
                f"a setting is dense, METHOD.PERCENT (vla-pruner.25) or METHOD.ACTIONS (fixed-horizon.6); got {name!r}"
            ) from None
        method = get_method(kind)
        options: dict[str, Any] = {"budget": value / 100}
        if issubclass(method, ChunkMethod):
            options = {"least": int(value)}
        elif issubclass(method, OneCutMethod):
            options = {"kept_share": value / 100, "layer": LAYER}
        if hasattr(method, "window"):  # of about six calls in an episode, a longer memory would leave few to prune
            options["window"] = 1
        return cls(name, (method.from_dict(options),))

    def applied(self, policy: Policy) -> AbstractContextManager[object]:
        """Decorates the policy, or its model, for the length of a block."""
        if not self.methods:
            return nullcontext()
        on_chunks = isinstance(self.methods[0], ChunkMethod)
        return mmaccel.applied(policy if on_chunks else policy.model, *self.methods)


def settings(names: str) -> list[Setting]:
    """Those of a list with commas; the first is dense, which the others are compared with."""
    return [Setting.of(name) for name in dict.fromkeys(["dense", *as_list(names)])]
