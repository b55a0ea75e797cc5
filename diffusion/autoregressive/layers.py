"""Transformer blocks with pre-normalisation, and a key-value cache whose rows may stand at different lengths."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from diffusion.autoregressive.configuration import MARConfig


class KeyValues:
    """Keys and values of all layers, rows and positions of a run.

    What lies at positions after a row's current one is stale: it is never read, and overwritten before it could be.
    So going back to an earlier position costs nothing.
    """

    def __init__(self, config: MARConfig, rows: int, like: Tensor) -> None:
        shape = (config.encoder_layers, rows, config.tokens, config.hidden_size)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    def exchange(self, layer: int, place: Place, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes [rows, new, width] at their positions; returns all that these rows may read: [rows, past, width]."""
        found = []
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            store[place.rows[:, None], place.positions] = new
            read = store[:, : place.end]
            found.append(read if len(place.rows) == len(store) else read[place.rows])
        return found[0], found[1]


class Place:
    """Where a pass over some rows of a run stands.

    rows: ascending.  positions: of the new inputs.  mask: who sees whom, None if everybody sees everything.
    """

    def __init__(self, rows: Int[Tensor, "rows"], positions: Int[Tensor, "rows new"]) -> None:
        self.rows, self.positions = rows, positions
        self.end = int(positions.max()) + 1
        visible = torch.arange(self.end, device=positions.device) <= positions[..., None]
        self.mask: Bool[Tensor, "rows 1 new past"] | None = None if bool(visible.all()) else visible[:, None]


class Attention(nn.Module):
    """Multi-head attention; full, or causal over a cache."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.heads = config.attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor | None, cache: tuple[KeyValues, int, Place] | None = None) -> Tensor:
        query, key, value = self.query_key_value(hidden).chunk(3, dim=-1)
        if cache is not None:
            store, layer, place = cache
            key, value = store.exchange(layer, place, key, value)
        query, key, value = (
            rearrange(part, "rows tokens (heads width) -> rows heads tokens width", heads=self.heads)
            for part in (query, key, value)
        )
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed: Tensor = self.out(rearrange(seen, "rows heads tokens width -> rows tokens (heads width)"))
        return mixed


class Block(nn.Module):
    """Attention and MLP, each added to its input."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(
        self,
        hidden: Float[Tensor, "rows tokens width"],
        mask: Tensor | None = None,
        cache: tuple[KeyValues, int, Place] | None = None,
    ) -> Float[Tensor, "rows tokens width"]:
        hidden = hidden + self.attention(self.attention_norm(hidden), mask, cache)
        added: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return added
