"""VLA-Pruner: keep the visual tokens that matter for understanding or for acting, and of those the most different.

Source: "VLA-Pruner: Temporal-Aware Dual-Level Visual Token Pruning for Efficient Vision-Language-Action Inference"
(arXiv:2511.16449v3), sections 3 and 4, and its released code for OpenVLA.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmaccel.methods import Unsupported
from vision_tokens.decoder_layers import OneCutMethod, keep_highest
from vision_tokens.layer_view import LayerView

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from mmaccel.checks import LawResult


@dataclass(frozen=True, kw_only=True)
class VLAPruner(OneCutMethod):
    """Drop the visual tokens that neither the prompt nor the last steps' action tokens attend to, and near doubles.

    budget: mean share (or number) of visual tokens over the language model's layers.
    kept_share: the paper's retention, the share kept at the cut, in place of a budget; 0.5 if neither is given.
    layer: the first layer that works on fewer tokens; the layer before it ranks them.
    rows: whose attention ranks tokens for understanding: the prompt's "last" token's, as in the released code; its
        "text"'s behind the pictures, without its first and its last token; or all of its rows' ("prefill", the
        paper's: O(n^2) time, and in a causal model early tokens are seen by more rows).
    window, decay: how many steps' action attention guides the next choice, and what a step less recent counts.
    heaviest: "newest", as in the paper; the released code weighs the "oldest" step most.
    action_layer: the layer whose action tokens are read, 15 in the released code; by default the second half, as in
        the paper.
    unseen: what a step says of a token that it dropped.  "zero" (released): dropped tokens can only come back through
        the prompt's attention, so that a choice confirms itself.  "carried": what the step before said, and the
        attention of the kept ones is scaled to sum to one with it.
    refresh: after so many steps that drop, one works on all tokens and sees them anew; None for never.
    floor: of several cameras, each keeps at least this share of an equal part; the rest is chosen jointly.

    An episode's first `window` steps drop nothing (an episode shorter than that never does), and neither do refresh
    steps; the report names each step.  Rows of a batch are episodes of their own: `Policy.reset(rows)`, or
    `robotics.reset(model, rows)` without a policy.  Works on models that decode action tokens, and on transformers'
    pi0, whose expert's attention is averaged over actions and denoising steps.
    """

    name: ClassVar[str] = "vla-pruner"
    stages: ClassVar[tuple[str, ...]] = ("prefill", "decoder")  # tokens are known again by their place in the prompt
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "openvla-released": {
            "kept_share": 0.5, "rows": "last", "heaviest": "oldest", "action_layer": 15, "unseen": "zero",
            "refresh": None, "floor": 0.0,
        },
        "paper": {"kept_share": 0.5, "rows": "prefill", "unseen": "zero", "refresh": None, "floor": 0.0},
    }  # fmt: skip

    layer: int = 3
    rows: Literal["last", "text", "prefill"] = "last"
    window: int = 3
    decay: float = 0.8
    heaviest: Literal["newest", "oldest"] = "newest"
    action_layer: int | None = None
    unseen: Literal["carried", "zero"] = "carried"
    refresh: int | None = 10
    floor: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("decay", "floor"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"vla-pruner's {name} lies in [0, 1]; got {value!r}")
        for name in ("window", "refresh"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"vla-pruner's {name} is a number of steps from 1 up; got {value!r}")

    def action_layers(self, layers: int) -> Sequence[int]:
        """The layers whose action tokens are read.  Raises `Unsupported` for one before the cut, or that is not there.

        The second half of the layers, where it lies behind the cut.
        """
        if self.action_layer is None:
            return range(max(layers // 2, self.layer), layers)
        if not self.layer <= self.action_layer < layers:
            raise Unsupported(
                f"vla-pruner reads action tokens behind its cut before layer {self.layer}, and this decoder has "
                f"{layers} layers: action_layer lies in {self.layer}..{layers - 1}, got {self.action_layer}; None "
                "reads the second half"
            )
        return (self.action_layer,)

    def score(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        """What a token is worth for understanding: the mean attention that it gets, over heads and rows."""
        if self.rows == "prefill":
            total = torch.zeros(view.real.shape, device=view.real.device)
            for _, attention in view.blocks():
                total[:, : attention.shape[-1]] += attention.mean(dim=1).sum(dim=1)
            return total / view.real.sum(dim=-1, keepdim=True)
        return view.rows(view.last if self.rows == "last" else text_rows(view)).sum(dim=2).mean(dim=1)

    def guide(self, history: Sequence[Float[Tensor, " visual"]]) -> Float[Tensor, " visual"]:
        """What the visual tokens are worth for acting, by the last steps, the newest first; sums to one."""
        ages = torch.arange(1, len(history) + 1, device=history[0].device)
        weights = self.decay ** (ages if self.heaviest == "newest" else ages.flip(0)).float()
        guide = (weights[:, None] * torch.stack(list(history))).sum(dim=0)
        return guide / guide.sum().clamp(min=torch.finfo(guide.dtype).tiny)

    def remembered(
        self,
        attention: Float[Tensor, " visual"],
        kept: Bool[Tensor, " visual"],
        before: Float[Tensor, " visual"] | None,
    ) -> Float[Tensor, " visual"]:
        """What a step says of all its visual tokens, from what its action tokens attended to and the step before.

        Attention sums to one over all tokens.  If dropped ones would have got what they got before, those that were
        kept would have got what that leaves.
        """
        attention = attention.where(kept, 0.0)
        if self.unseen == "zero" or before is None:
            return attention
        carried = before.where(~kept, 0.0)
        return attention * (1 - carried.sum()).clamp(min=0) + carried

    def select(
        self,
        semantic: Float[Tensor, "batch tokens"],
        guide: Float[Tensor, "batch tokens"],
        features: Float[Tensor, "batch tokens width"],
        camera: Int[Tensor, "batch tokens"],
        counts: Sequence[int],
    ) -> Bool[Tensor, "batch tokens"]:
        """The visual tokens that stay, as many of each row as `counts` says.

        camera: the one that each token shows, -1 for those that are not visual.
        """
        visual, cameras = camera >= 0, int(camera.max()) + 1
        chosen = torch.zeros_like(visual)
        if cameras > 1 and self.floor > 0:
            shown = torch.stack([(camera == number).any(dim=-1) for number in range(cameras)])
            parts = shown.sum(dim=0).clamp(min=1).tolist()
            for number in range(cameras):
                own = camera == number
                floors = [int(self.floor * count / part) for count, part in zip(counts, parts, strict=True)]
                present = [min(floor, held) for floor, held in zip(floors, own.sum(dim=-1).tolist(), strict=True)]
                chosen |= dual_top(semantic, guide, features, own, present)
        left = [count - held for count, held in zip(counts, chosen.sum(dim=-1).tolist(), strict=True)]
        return chosen | dual_top(semantic, guide, features, visual & ~chosen, left)

    def attach(self, target: Any, attachment: Attachment) -> None:
        from robotics.gaze import attach

        attach(self, target, attachment)

    def laws(self, target: Any, inputs: Mapping[str, Any]) -> Iterable[LawResult]:
        from robotics.laws import pruner_laws

        return pruner_laws(target, self, inputs)


def text_rows(view: LayerView) -> Int[Tensor, "batch rows"]:
    """The prompt's tokens behind the pictures, without the first and the last; the last if that leaves none.

    Filled up with -1, and repeated never: their rows are to be summed over, so each stands for itself alone.
    """
    tokens = view.real.shape[1]
    places = torch.arange(tokens, device=view.real.device)
    first = torch.where(view.visual, places, -1).max(dim=-1, keepdim=True).values + 2
    chosen = (places >= first) & (places < view.last) & view.real
    chosen |= ~chosen.any(dim=-1, keepdim=True) & (places == view.last)
    width = int(chosen.sum(dim=-1).max())
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)[:, :width]
    return torch.where(chosen.gather(1, order), order, -1)


def dual_top(
    semantic: Float[Tensor, "batch tokens"],
    guide: Float[Tensor, "batch tokens"],
    features: Float[Tensor, "batch tokens width"],
    among: Bool[Tensor, "batch tokens"],
    counts: Sequence[int],
) -> Bool[Tensor, "batch tokens"]:
    """So many of each row's tokens: the highest by either score, and of their union the most different.

    Source: section 4.2, the combination by minimal redundancy and maximal relevance.
    """
    union = keep_highest(semantic, among, counts) | keep_highest(guide, among, counts)
    wanted = torch.tensor(counts, device=union.device)
    over = (union.sum(dim=-1) > wanted).nonzero().flatten()
    if not len(over):
        return union
    width = int(union[over].sum(dim=-1).max())
    place = union[over].int().argsort(dim=-1, descending=True, stable=True)[:, :width]
    there = union[over].gather(1, place)
    own = features[over].gather(1, place[..., None].expand(-1, -1, features.shape[-1]))
    order = most_different(own, there, int(wanted[over].max()))
    ranked = torch.arange(order.shape[1], device=order.device) < wanted[over, None]
    keep = torch.zeros(len(over), union.shape[1] + 1, dtype=torch.bool, device=union.device)
    keep.scatter_(1, place.gather(1, order).where(ranked, union.shape[1]), True)
    return union.index_copy(0, over, keep[:, :-1])


def most_different(
    features: Float[Tensor, "batch tokens width"], among: Bool[Tensor, "batch tokens"], count: int
) -> Int[Tensor, "batch count"]:
    """Greedy max-min diversity: each pick is the farthest, by cosine, from its nearest among those picked before.

    The first is the one whose nearest other is farthest.  Of equals the earlier.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    distance = (1 - unit @ unit.mT).masked_fill(~among[:, None], torch.inf)
    nearest = distance.topk(2, dim=-1, largest=False).values[..., -1]
    left, rows = among.clone(), torch.arange(len(features), device=features.device)
    order: list[Tensor] = []
    for _ in range(count):
        pick = nearest.masked_fill(~left, -torch.inf).argmax(dim=-1)
        left[rows, pick] = False
        nearest = torch.minimum(nearest, distance[rows, pick]) if order else distance[rows, pick]
        order.append(pick)
    return torch.stack(order, dim=-1)
