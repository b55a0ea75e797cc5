"""Where the tokens of a picture come from, as colours: drafts that were accepted, rejected, and what came between."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from PIL import ImageColor
from torch import Tensor

from mmaccel.plots import COLOURS

PLAIN, KEPT, REDRAWN, BONUS = range(4)
"""Where a token comes from: the target alone, a draft, what replaced one, or the target after a round of drafts."""

SHOWN = {
    PLAIN: ("drawn by the model alone, before any draft", "#999999"),
    KEPT: ("a draft that was accepted", COLOURS[2]),
    REDRAWN: ("drawn again, because the draft was rejected", COLOURS[1]),
    BONUS: ("drawn by the model after a round of accepted drafts", COLOURS[5]),
}
COVER = 0.65  # of a token's colour over the picture


def coloured(
    origins: Int[Tensor, "images rows columns"], pictures: Float[Tensor, "images 3 height width"]
) -> Float[Tensor, "images 3 height width"]:
    """Each token's colour over its place in the picture, in 0..1."""
    table = torch.tensor([ImageColor.getrgb(SHOWN[kind][1]) for kind in sorted(SHOWN)]) / 255
    patch = pictures.shape[-1] // origins.shape[-1]
    wide = repeat(origins, "images rows columns -> images (rows y) (columns x)", y=patch, x=patch)
    return (1 - COVER) * pictures + COVER * rearrange(
        table[wide], "images height width colours -> images colours height width"
    )
