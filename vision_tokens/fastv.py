"""FastV: drop, early in the decoder, the visual tokens that the prompt's last token hardly attends to.

Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
Vision-Language Models", ECCV 2024 (arXiv:2403.06764), section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from mmaccel.budgets import Budget
from vision_tokens.decoder_layers import DecoderMethod, check_cuts, share_behind
from vision_tokens.layer_view import LayerView


@dataclass(frozen=True, kw_only=True)
class FastV(DecoderMethod):
    """Drop the visual tokens that the prompt's last token hardly attends to, once, before an early decoder layer.

    budget: mean share (or number) of visual tokens over the layers; the cut keeps what reaches it.
    layer: the first layer that works on fewer tokens, the paper's K, from 1 up.
    kept_share: the share kept at the cut, the paper's 1 - R, in place of a budget; 0.5 if neither is given.
    Scores are the last token's attention in layer K - 1, averaged over heads; a row's images share the budget.  The
    choice is made once, when the prompt is read; without a cache the released code, and we, make it at every step.
    """

    name: ClassVar[str] = "fastv"
    amounts: ClassVar[tuple[str, ...]] = ("kept_share",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llava-1.5-50": {"layer": 2, "kept_share": 0.5},
        "llava-1.5-25": {"layer": 2, "kept_share": 0.25},
    }

    budget: Budget | None = None
    layer: int = 2
    kept_share: float | None = None
    positions: Literal["kept", "packed"] = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kept_share is not None and not 0 <= self.kept_share <= 1:
            raise ValueError(
                f"kept_share, the share of visual tokens kept at the cut, lies in [0, 1]; got {self.kept_share!r}"
            )

    def cuts(self, layers: int) -> Sequence[int]:
        if self.keeps_all:
            return ()
        check_cuts(self, (self.layer,), layers)
        if isinstance(self.budget, float):
            share_behind(self, self.budget, self.layer, layers)
        return (self.layer,)

    def kept(self, layers: int, visual: int) -> Sequence[int]:
        mean = self.mean_share(visual)
        if mean is None:
            share = 0.5 if self.kept_share is None else self.kept_share
        else:
            share = share_behind(self, mean, self.layer, layers)
        return (round(visual * share),)

    def score(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        return view.rows(view.last)[:, :, 0].mean(dim=1)
