"""The laws of ZipAR's decoding, on the user's own model: `mmaccel check` holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion.autoregressive.zipar import ZipAR, passes
from mmaccel.api import applied
from mmaccel.checks import LawResult

SEED = 20252


def zipar_laws(method: ZipAR, target: Any, inputs: Mapping[str, Any]) -> Iterator[LawResult]:
    """The laws, one after the other: shares of tokens that differ, and passes."""

    def decoded() -> Tensor:
        torch.manual_seed(SEED)
        found: Tensor = target.generate(**inputs)
        return found

    def apart(one: Tensor, other: Tensor) -> float:
        return 1.0 if one.shape != other.shape else float((one != other).double().mean())

    plain = decoded()
    with applied(target, dataclasses.replace(method, window=plain.shape[1])):
        yield LawResult("a window of a whole row is plain decoding with the same seed", apart(decoded(), plain), 0.0)
    with applied(target, dataclasses.replace(method, adaptive=False)) as run:
        decoded()
        rows, columns = run.report.facts["picture_rows"], run.report.facts["row_length"]
        off = abs(run.report["passes"] - passes(rows, columns, method.window))
        yield LawResult("it takes as many passes as the formula says", off, 0.0)
    with applied(target, method):
        first, again = decoded(), decoded()
    yield LawResult("the same seed gives the same tokens", apart(again, first), 0.0)
    yield LawResult("the model comes back as it was", apart(decoded(), plain), 0.0)
