"""Dynamic-LLaVA: drop visual tokens once, early in the decoder, by what a trained predictor says of them.

Source: Huang et al., "Dynamic-LLaVA: Efficient Multimodal Large Language Models via Dynamic Vision-language Context
Sparsification", ICLR 2025 (arXiv:2412.00876), section 3.2.  What it does while decoding is `vision_tokens.output_gate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from vision_tokens.decoder_layers import OneCutMethod
from vision_tokens.layer_view import LayerView

if TYPE_CHECKING:
    from vision_tokens.predictors import ImagePredictor


@dataclass(frozen=True, kw_only=True)
class DynamicLLaVA(OneCutMethod):
    """Drop, once, before an early decoder layer, the visual tokens that a trained predictor does not want to keep.

    budget: mean share (or number) of visual tokens over the layers; the cut keeps what reaches it.
    weights: a safetensors file with the parameters image_score_predictor.* of the release (which fine-tuned its
        language model along with them), or "pocket-llava" for those that ship, trained for that model alone.  None:
        the training-free form, the same cut with the last token's attention as the score, as FastV ranks.
    layer: the first layer that works on fewer tokens, the paper's l, from 1 up.
    kept_share: the share kept at the cut, in place of a budget; 0.5 if neither is given, the paper's is 0.2.
    The highest logits for keeping, as a log-probability, stay: a share of the tokens, not those that the predictor says
    yes to, as in the released code.  It counts int(tokens * share), and we the nearest number.  A row's images are
    judged together, and rows of a batch apart; the released code takes one image a row.
    """

    name: ClassVar[str] = "dynamic-llava"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llava-1.5-20": {"layer": 2, "kept_share": 0.2},
        "pocket-llava": {"weights": "pocket-llava", "layer": 2, "kept_share": 0.2},
    }

    weights: str | None = None
    layer: int = 2

    def predictor(self, states: int) -> ImagePredictor | None:
        from vision_tokens.predictors import ImagePredictor

        return None if self.weights is None else ImagePredictor.load(self.weights, states)

    def score(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        return view.rows(view.last)[:, :, 0].mean(dim=1)
