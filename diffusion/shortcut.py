"""The short way from clean latents to pictures, for pipelines whose tail is no more than their autoencoder.

A nested call of a pipeline (see `diffusion.tail`) costs milliseconds beside its autoencoder. It is watched once: if
a rule below makes exactly what reached the autoencoder of the latents, and exactly the pictures of what it gave, later
decodes of the run go that way.  Nothing is assumed from the pipeline's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmaccel.attachment import patched

Way = Callable[[Tensor], Tensor]


@dataclass
class Watched:
    """The calls of an autoencoder's `decode`: (what it was given, what it gave)."""

    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@contextmanager
def watching(vae: Any) -> Iterator[Watched]:
    """Watches the autoencoder's `decode` for the length of the block."""
    watched, original = Watched(), vae.decode

    def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = original(latents, *args, **kwargs)
        watched.calls.append((latents, given[0]))
        return given

    with patched(vae, "decode", decode):
        yield watched


def find_shortcut(vae: Any, watched: Watched, latents: Tensor, pictures: Tensor) -> Way | None:
    """The short way that leads from these latents to these pictures, bit for bit; None if there is none."""
    if len(watched.calls) != 1:
        return None
    (seen, decoded), scaling, shift = watched.calls[0], vae.config.get("scaling_factor"), vae.config.get("shift_factor")
    if not scaling or vae.dtype != seen.dtype:  # upcast for its decoding only
        return None
    ways: list[Way] = [lambda given: given / scaling, lambda given: 1 / scaling * given]
    if shift is not None:
        ways.append(lambda given: given / scaling + shift)
    if not torch.equal((decoded * 0.5 + 0.5).clamp(0, 1).float(), pictures):
        return None
    for way in ways:
        if torch.equal(way(latents.to(seen)), seen):
            return lambda given, way=way: (vae.decode(way(given.to(seen)))[0] * 0.5 + 0.5).clamp(0, 1).float()  # type: ignore[misc]
    return None
