"""Whether pictures of speculation come from the distribution of plain generation, with plain against plain beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmaccel
from diffusion.autoregressive.painters import Painter
from diffusion.autoregressive.two_samples import energy_test
from mmaccel.bench import Figure, Progress, silent
from mmaccel.bench_rows import Row, kept_rows
from mmaccel.methods import Method

AGAIN = "plain again"
SEEDS = 10_000_000  # apart lie the seeds of two settings


def measure(
    painter: Painter,
    methods: Mapping[str, Method],
    images: int,
    batch: int,
    call: Mapping[str, Any],
    folder: Path | None,
    progress: Progress = silent,
) -> list[Row]:
    """A row a setting: the energy distance of its pictures to plain ones, and the p-value.

    Plain pictures of other seeds are one of the settings.  All settings draw the same labels.
    """
    pictures = {}
    for place, (name, method) in enumerate({"plain": None, AGAIN: None, **methods}.items()):

        def told(done: int, name: str = name) -> None:
            progress(name, done, images)

        make = partial(drawn, painter, method, batch, SEEDS * place, call, told)
        rows = kept_rows(name.replace(" ", "-"), images, folder, make, key="image")
        pictures[name] = torch.tensor([row["numbers"] for row in rows])
    plain = pictures.pop("plain")
    found = []
    for name, others in pictures.items():
        distance, p = energy_test(plain, others)
        found.append({"setting": name, "images": images, "distance": distance, "p": p})
    return found


def drawn(
    painter: Painter,
    method: Method | None,
    batch: int,
    seed: int,
    call: Mapping[str, Any],
    told: Any,
    numbers: Sequence[int],
) -> Iterator[Row]:
    """The pictures of these numbers: latents of continuous tokens, pixels of discrete ones."""
    for start in range(0, len(numbers), batch):
        some = numbers[start : start + batch]
        told(some[0])
        with mmaccel.applied(painter.model, method) if method else nullcontext():
            made = painter.draw([number % painter.classes for number in some], seed + some[0], **call)
        yield from ({"numbers": values} for values in flat(painter, made).tolist())


def flat(painter: Painter, made: Tensor) -> Tensor:
    """Numbers that are near for pictures that are alike, [images, numbers]."""
    space = made if made.is_floating_point() else painter.shown(made)
    return space.flatten(1)


def compare(rows: Sequence[Row]) -> dict[str, Figure]:
    """`p.SETTING`, the p-value of the permutation test against plain pictures, and `distance.SETTING`."""
    figures = {}
    for row in rows:
        if "p" in row:
            name = row["setting"].replace(" ", "_")
            figures[f"p.{name}"] = Figure(row["p"])
            figures[f"distance.{name}"] = Figure(row["distance"])
    return figures
