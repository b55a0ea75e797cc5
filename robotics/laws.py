"""The laws of methods that remember an episode, measured on a model that is called without a policy around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmaccel.api import applied
from mmaccel.checks import LawResult
from mmaccel.methods import Unsupported
from robotics.episodes import reset
from robotics.flow import is_pi0
from vision_tokens.decoder_laws import layerwise_masked_logits
from vision_tokens.laws import BARS, fingerprint, generated, largest_difference

if TYPE_CHECKING:
    from robotics.vla_pruner import VLAPruner


def pruner_laws(model: nn.Module, method: VLAPruner, inputs: Mapping[str, Any], tokens: int = 7) -> Iterator[LawResult]:
    """An episode that shows the same picture again and again; its first step that drops tokens is looked at."""
    if is_pi0(model) or not hasattr(model, "generate"):
        raise Unsupported("check measures logits of models that decode action tokens with generate; pi0 has none")
    bar = BARS.get(next(model.parameters()).dtype, 1e-1)
    _, dense = generated(model, inputs, tokens)
    before = fingerprint(model)

    def episode() -> list[tuple[Tensor, Tensor]]:
        reset(model)
        return [generated(model, inputs, tokens) for _ in range(method.window + 1)]

    with applied(model, method.with_budget(1.0)):
        yield LawResult("keeping everything is the dense model", largest_difference(episode()[-1][1], dense), 0.0)
    with applied(model, method):
        first = episode()
        chosen, logits = first[-1]
        warm = max(largest_difference(step[1], dense) for step in first[:-1])
        yield LawResult("steps that drop nothing are dense", warm, bar)
        masked = layerwise_masked_logits(model, inputs, chosen)
        yield LawResult("dropping in a layer equals masking from it on", largest_difference(logits, masked), bar)
        again = torch.stack([step[1] for step in episode()])
        same = largest_difference(torch.stack([step[1] for step in first]), again)
        yield LawResult("the second episode equals the first", same, 0.0)
    _, undone = generated(model, inputs, tokens)
    yield LawResult("removed, the logits are the dense ones", largest_difference(undone, dense), 0.0)
    yield LawResult("removed, nothing is left behind", float(fingerprint(model) != before), 0.0)
