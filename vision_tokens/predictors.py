"""Dynamic-LLaVA's predictors: small trained networks that say, from hidden states, which tokens are worth keeping.

Source: Huang et al., "Dynamic-LLaVA: Efficient Multimodal Large Language Models via Dynamic Vision-language Context
Sparsification", ICLR 2025 (arXiv:2412.00876), section 3.2, and its released code, whose names the parameters have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from mmaccel import pocket
from mmaccel.methods import Unsupported
from vision_tokens.weights import fill, tensors_under

HEADS = 8  # of the image predictor's attention, whatever its width
SHIPPED = "pocket-llava"


def head(width: int) -> list[nn.Module]:
    """Down to the two logits, keep and drop."""
    return [
        nn.Linear(width, width // 2),
        nn.GELU(),
        nn.Linear(width // 2, width // 4),
        nn.GELU(),
        nn.Linear(width // 4, 2),
    ]


def entry(states: int, width: int) -> list[nn.Module]:
    """From hidden states to the predictor's width."""
    return [nn.LayerNorm(states), nn.Linear(states, width), nn.GELU()]


class Predictor(nn.Module):
    """Base of both predictors.

    key: what the parameters' names begin with in a file.  first: the one that reads hidden states.
    """

    key: str
    first: str

    @classmethod
    def load(cls, weights: str, states: int) -> Self:
        """The predictor in a safetensors file, for hidden states `states` wide.

        weights: the file's path, or "pocket-llava" for what ships.  It may hold more, under names with a prefix.
        Raises `Unsupported` if it holds no such predictor, a part of one, or one of another width.
        """
        file = pocket.path(SHIPPED) / "dynamic-llava.safetensors" if weights == SHIPPED else Path(weights)
        found = tensors_under(f"{cls.key}.", file)
        if cls.first not in found:
            raise Unsupported(f"{weights!r} holds no {cls.key}.{cls.first}, so no predictor that weights= could bring")
        width, given = found[cls.first].shape
        if given != states:
            raise Unsupported(
                f"the predictor in {weights!r} reads hidden states of width {given}, and this model's are {states} "
                "wide; it belongs to another model"
            )
        predictor = cls(states, width, sum(name.endswith(".norm1.weight") for name in found))
        fill(predictor, found, cls.key, weights)
        return predictor


class OutputPredictor(Predictor):
    """Says of each token, by its hidden state alone, whether later ones should see it."""

    key, first = "output_text_score_predictor", "output_mlp.1.weight"

    def __init__(self, states: int, width: int, blocks: int = 0) -> None:
        super().__init__()
        self.output_mlp = nn.Sequential(*entry(states, width), *head(width))

    def forward(self, states: Float[Tensor, "*batch states"]) -> Float[Tensor, "*batch 2"]:
        logits: Tensor = self.output_mlp(states)
        return logits


class ImagePredictor(Predictor):
    """Says of an image's tokens, looking at all of them, which to keep."""

    key, first = "image_score_predictor", "down_mlp.1.weight"

    def __init__(self, states: int, width: int, blocks: int = 2) -> None:
        super().__init__()
        self.down_mlp = nn.Sequential(*entry(states, width))
        self.transformer = nn.ModuleList(Block(width) for _ in range(blocks))
        self.output_mlp = nn.Sequential(*head(width))

    def forward(
        self, states: Float[Tensor, "batch tokens states"], real: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens 2"]:
        """Logits, keep and drop.  real: which tokens are no padding; None if all are."""
        hidden = self.down_mlp(states)
        for block in self.transformer:
            hidden = block(hidden, real)
        local, other = hidden.chunk(2, dim=-1)
        share = torch.ones_like(states[..., :1]) if real is None else real[..., None].to(states.dtype)
        mean = (other * share).sum(dim=1, keepdim=True) / share.sum(dim=1, keepdim=True).clamp(min=1)
        logits: Tensor = self.output_mlp(torch.cat([local, mean.expand_as(other)], dim=-1))
        return logits


class Block(nn.Module):
    """A transformer encoder's layer, normed before, four times as wide in its middle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width, bias=False), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(
        self, hidden: Float[Tensor, "batch tokens width"], real: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch tokens width"]:
        parts = self.attn["qkv"](self.norm1(hidden))
        query, key, value = rearrange(parts, "b t (part heads w) -> part b heads t w", part=3, heads=HEADS)
        mask = None if real is None else real[:, None, None]
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = hidden + self.attn["proj"](rearrange(attended, "b heads t w -> b t (heads w)"))
        wide = functional.gelu(self.mlp["fc1"](self.norm2(hidden)))
        found: Tensor = hidden + self.mlp["fc2"](wide)
        return found
