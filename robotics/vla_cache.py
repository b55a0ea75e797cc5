"""VLA-Cache: what stands still between two control steps, and is not looked at, keeps its keys and values.

Source: "VLA-Cache: Towards Efficient Vision-Language-Action Model via Adaptive Token Caching in Robotic Manipulation"
(arXiv:2502.02175), section 3, and its released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mmaccel.methods import Method

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment


@dataclass(frozen=True, kw_only=True)
class VLACache(Method):
    """Let visual tokens whose patch stands still, and that the instruction does not look at, keep keys and values.

    threshold: the cosine similarity of a patch's pixels to the step before from which on it stands still.
    static: at most this share of a camera's tokens does, the most similar; 130 of 256 in the released code.
    relevant: the share of all visual tokens that the words look at most, computed anew at any rate; 120 of 256.
    growth: how much of a rise of the share from layer to layer is followed, from 0 to 1.
    Such tokens rest from the layer on at which a growing share of them does: the more concentrated a layer's
    attention was, the larger the share.  They neither query nor pass through the layer; the others read the keys and
    values of the step before in their place.  Shares never fall with depth here, since a token that rests has nothing
    to go on with; of those that could rest the most similar do first.  An episode's first step computes all tokens and
    reads every layer's attention; the released code reads it at every step, which would cost more than it saves.
    Pictures are compared, so this decorates a policy.
    """

    name: ClassVar[str] = "vla-cache"
    stages: ClassVar[tuple[str, ...]] = ("prefill", "decoder")
    knob: ClassVar[str | None] = None

    threshold: float = 0.996
    static: float = 130 / 256
    relevant: float = 120 / 256
    growth: float = 0.55

    def __post_init__(self) -> None:
        for name in ("static", "relevant", "growth"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"vla-cache's {name} is a share, in [0, 1]; got {value!r}")

    def attach(self, target: Any, attachment: Attachment) -> None:
        from robotics.reuse import attach

        attach(self, target, attachment)


def patch_similarity(
    picture: Float[Tensor, "3 height width"], before: Float[Tensor, "3 height width"], side: int
) -> Float[Tensor, " patches"]:
    """The cosine similarity of the pixels of each patch, in reading order, of a grid with so many patches a side."""
    height, width = picture.shape[1] // side, picture.shape[2] // side

    def patches(pixels: Tensor) -> Tensor:
        cut = pixels[:, : side * height, : side * width]
        return rearrange(cut, "c (row y) (column x) -> (row column) (c y x)", row=side, column=side)

    return torch.nn.functional.cosine_similarity(patches(picture), patches(before), dim=-1)


def still(similarity: Float[Tensor, " patches"], threshold: float, most: int) -> Int[Tensor, " still"]:
    """The patches that stand still, the most similar first, and at most so many."""
    order = similarity.argsort(descending=True, stable=True)
    return order[similarity[order] >= threshold][:most]


def looked_at(attention: Float[Tensor, " visual"], count: int) -> Int[Tensor, " count"]:
    """The visual tokens that the words look at most."""
    return attention.argsort(descending=True, stable=True)[:count]


def reusable(static: Int[Tensor, " still"], relevant: Int[Tensor, " count"]) -> Int[Tensor, " rest"]:
    """Those that stand still and are not looked at, in the order of the former."""
    return static[~torch.isin(static, relevant)]


def reuse_shares(entropy: Float[Tensor, " layers"], growth: float) -> Float[Tensor, " layers"]:
    """The share of the reusable tokens that each layer reuses: the more, the lower its attention's entropy.

    Entropies are scaled to [0, 1]; of a rise to the next layer, only a part is followed.
    """
    span = (entropy.max() - entropy.min()).clamp(min=torch.finfo(entropy.dtype).tiny)
    shares = 1 - (entropy - entropy.min()) / span
    for layer in range(1, len(shares)):
        rise = shares[layer] - shares[layer - 1]
        if rise > 0:
            shares[layer] = shares[layer - 1] + growth * rise
    return shares
