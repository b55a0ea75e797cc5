"""FastV: drop, early in the decoder, the visual tokens that the prompt's last token hardly attends to.

Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
Vision-Language Models", ECCV 2024 (arXiv:2403.06764), section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from vision_tokens.decoder_layers import OneCutMethod
from vision_tokens.layer_view import LayerView


@dataclass(frozen=True, kw_only=True)
class FastV(OneCutMethod):
    """Drop the visual tokens that the prompt's last token hardly attends to, once, before an early decoder layer.

    budget: mean share (or number) of visual tokens over the layers; the cut keeps what reaches it.
    layer: the first layer that works on fewer tokens, the paper's K, from 1 up.
    kept_share: the share kept at the cut, the paper's 1 - R, in place of a budget; 0.5 if neither is given.
    Scores are the last token's attention in layer K - 1, averaged over heads; a row's images share the budget.  The
    choice is made once, when the prompt is read; without a cache the released code, and we, make it at every step.
    """

    name: ClassVar[str] = "fastv"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llava-1.5-50": {"layer": 2, "kept_share": 0.5},
        "llava-1.5-25": {"layer": 2, "kept_share": 0.25},
    }

    layer: int = 2

    def score(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        return view.rows(view.last)[:, :, 0].mean(dim=1)
