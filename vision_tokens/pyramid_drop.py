"""PyramidDrop: at a few depths of the decoder, drop the visual tokens that the prompt's last token attends to least.

Source: Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
Reduction", CVPR 2025 (arXiv:2410.17247), section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from mmaccel.budgets import Budget
from vision_tokens.decoder_layers import DecoderMethod, checked_cuts, share_behind, solved
from vision_tokens.layer_view import LayerView


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(DecoderMethod):
    """Keep, at every quarter of the decoder's depth, a share of the visual tokens of the stage before.

    budget: mean share (or number) of visual tokens over the layers; the ratio that reaches it is solved for.
    ratio: the share of its tokens that each stage hands on, the paper's lambda, in place of a budget; 0.5 if neither is
        given.
    cut_before: the layers before which tokens go; by default the quarters of the depth, 8, 16 and 24 of 32.
    Scores are the last token's attention in the layer that is about to run, computed from its input ahead of time and
    averaged over heads.  The released code numbers the positions anew at every stage; that is positions="packed".
    """

    name: ClassVar[str] = "pyramid-drop"
    scored_in: ClassVar[Literal["the layer before", "the layer itself"]] = "the layer itself"
    amounts: ClassVar[tuple[str, ...]] = ("ratio",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llava-next-7b": {"ratio": 0.5, "cut_before": (8, 16, 24)},
        "released-code": {"ratio": 0.5, "positions": "packed"},
    }

    budget: Budget | None = None
    ratio: float | None = None
    cut_before: tuple[int, ...] | None = None
    positions: Literal["kept", "packed"] = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise ValueError(
                f"ratio, the share of its tokens that a stage hands on, lies in [0, 1]; got {self.ratio!r}"
            )

    def cuts(self, layers: int) -> Sequence[int]:
        return checked_cuts(self, self._stages(layers), layers)

    def _stages(self, layers: int) -> Sequence[int]:
        if self.cut_before is not None:
            return self.cut_before
        return sorted({max(1, round(layers * quarter / 4)) for quarter in (1, 2, 3)})

    def kept(self, layers: int, visual: int) -> Sequence[int]:
        ratio = self._ratio(layers, visual)
        return [int(visual * ratio**stage) for stage in range(1, len(self._stages(layers)) + 1)]

    def _ratio(self, layers: int, visual: int) -> float:
        mean = self.mean_share(visual)
        if mean is None:
            return 0.5 if self.ratio is None else self.ratio
        cuts = self._stages(layers)
        share_behind(self, mean, cuts[0], layers)
        lengths = [end - start for start, end in zip((0, *cuts), (*cuts, layers), strict=True)]

        def mean_at(ratio: float) -> float:
            return sum(length * ratio**stage for stage, length in enumerate(lengths)) / layers

        return solved(mean_at, mean, 0.0, 1.0)

    def score(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        return view.rows(view.last)[:, :, 0].mean(dim=1)
