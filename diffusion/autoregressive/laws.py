"""The laws of speculation, on the user's own pair of models: `mmaccel check` holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion.autoregressive.speculation import ContinuousSpeculation, loaded
from mmaccel.api import applied
from mmaccel.checks import LawResult

SEED, BAR = 20251, 1e-3
"""BAR: how far latents may differ for two orders of summation in float32."""


def speculation_laws(method: ContinuousSpeculation, target: Any, inputs: Mapping[str, Any]) -> Iterator[LawResult]:
    """The laws, one after the other."""
    arguments = {name: value for name, value in inputs.items() if name != "generator"}
    images = arguments.get("num_images") or len(arguments.get("labels", [0]))
    method = dataclasses.replace(method, draft=loaded(method.draft))

    def drawn(first: int = SEED, **more: Any) -> Tensor:
        generators = [torch.Generator().manual_seed(first + number) for number in range(images)]
        found: Tensor = target.generate(**{**arguments, **more}, generator=generators)
        return found

    def apart(one: Tensor, other: Tensor) -> float:
        return float((one - other).abs().max() / other.abs().max())

    plain = drawn()
    if method.mode != "published":
        with applied(target, dataclasses.replace(method, length=0)):
            yield LawResult("without drafts it is plain generation", apart(drawn(), plain), 0.0)
        with applied(target, dataclasses.replace(method, draft=target, guide_draft=True)) as run:
            same = apart(drawn(), plain)
            refused = 1 - run.report["acceptance"]
        yield LawResult("the target as its own draft is never refused", refused, 0.0)
        yield LawResult("and draws what plain generation draws", same, BAR)
    if method.length != "adaptive":  # which reads the clock
        with applied(target, method):
            first, again = drawn(), drawn()
        yield LawResult("the same seed gives the same images", apart(again, first), 0.0)
    yield LawResult("the model comes back as it was", apart(drawn(), plain), 0.0)
