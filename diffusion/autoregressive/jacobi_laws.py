"""The laws of speculative Jacobi decoding, on the user's own model: `mmaccel check` holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion.autoregressive.jacobi import SpeculativeJacobi
from mmaccel.api import applied
from mmaccel.checks import LawResult

SEED = 20252


def jacobi_laws(method: SpeculativeJacobi, target: Any, inputs: Mapping[str, Any]) -> Iterator[LawResult]:
    """The laws, one after the other: shares of tokens that differ, and passes."""

    def decoded(**more: Any) -> Tensor:
        torch.manual_seed(SEED)
        found: Tensor = target.generate(**{**inputs, **more})
        return found

    def apart(one: Tensor, other: Tensor) -> float:
        return 1.0 if one.shape != other.shape else float((one != other).double().mean())

    plain, greedy = decoded(), decoded(do_sample=False)
    with applied(target, method):
        yield LawResult("greedy decoding is plain greedy decoding", apart(decoded(do_sample=False), greedy), 0.0)
    found = {}
    for window in (1, max(2, method.window)):
        with applied(target, dataclasses.replace(method, redraw="gumbel", group=1, window=window)) as run:
            found[window], passes = decoded(), run.report["passes"]
    one, other = found.values()
    yield LawResult("with one noise a position, a window decodes what single tokens decode", apart(other, one), 0.0)
    prompt = inputs["inputs" if "inputs" in inputs else "input_ids"]
    yield LawResult("it takes no more passes than there are tokens", passes, other.shape[1] - prompt.shape[1])
    with applied(target, method):
        first, again = decoded(), decoded()
    yield LawResult("the same seed gives the same tokens", apart(again, first), 0.0)
    yield LawResult("the model comes back as it was", apart(decoded(), plain), 0.0)
