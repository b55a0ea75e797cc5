"""Backbones: from the tokens that are there to a condition for every position that is not."""

from __future__ import annotations

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diffusion.autoregressive.configuration import MARConfig
from diffusion.autoregressive.layers import Block, KeyValues, Place


class MaskedBackbone(nn.Module):
    """MAR's encoder and decoder, with full attention: the encoder sees the visible tokens alone.

    Source: arXiv:2406.11838, section 3.4.  It has no cache: another set of visible tokens changes everything.
    """

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        width, places = config.hidden_size, config.tokens + config.buffer_tokens
        self.buffer = config.buffer_tokens
        self.embed = nn.Linear(config.token_size, width)
        self.embed_norm = nn.LayerNorm(width, eps=1e-6)
        self.encoder_positions = nn.Parameter(torch.zeros(1, places, width))
        self.encoder = nn.ModuleList(Block(config) for _ in range(config.encoder_layers))
        self.encoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_positions = nn.Parameter(torch.zeros(1, places, width))
        self.decoder = nn.ModuleList(Block(config) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head_positions = nn.Parameter(torch.zeros(1, config.tokens, width))

    def forward(
        self,
        tokens: Float[Tensor, "rows tokens size"],
        visible: Bool[Tensor, "rows tokens"],
        label: Float[Tensor, "rows width"],
    ) -> Float[Tensor, "rows tokens width"]:
        """The conditions of all positions.  Rows may see different numbers of tokens."""
        visible = torch.cat([visible.new_ones(len(visible), self.buffer), visible], dim=1)
        hidden = torch.cat([repeat(label, "rows width -> rows n width", n=self.buffer), self.embed(tokens)], dim=1)
        hidden = self.embed_norm(hidden + self.encoder_positions)
        counts = visible.sum(dim=1)
        most, ragged = int(counts.max()), bool((counts != counts[0]).any())
        chosen = (~visible).int().argsort(dim=1, stable=True)[:, :most, None].expand(-1, -1, hidden.shape[-1])
        mask = torch.arange(most, device=counts.device) < counts[:, None]
        kept = hidden.gather(1, chosen)
        for block in self.encoder:
            kept = block(kept, mask[:, None, None] if ragged else None)
        kept = self.decoder_embed(self.encoder_norm(kept))
        hidden = torch.where(visible[..., None], hidden.scatter(1, chosen, kept), self.mask_token)
        hidden = hidden + self.decoder_positions
        for block in self.decoder:
            hidden = block(hidden)
        conditions: Tensor = self.decoder_norm(hidden)[:, self.buffer :] + self.head_positions
        return conditions


class CausalBackbone(nn.Module):
    """A stack that reads the class, then tokens in raster order; its output at input i is the condition of token i.

    Source: the causal model that arXiv:2406.11838 compares with (section 3.3), raster order.
    """

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(config.token_size, config.hidden_size)
        self.positions = nn.Parameter(torch.zeros(1, config.tokens, config.hidden_size))
        self.encoder = nn.ModuleList(Block(config) for _ in range(config.encoder_layers))
        self.encoder_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        tokens: Float[Tensor, "rows new size"],
        label: Float[Tensor, "rows width"],
        place: Place,
        cache: KeyValues | None = None,
    ) -> Float[Tensor, "rows new width"]:
        """The conditions of the positions of `place`, from the tokens just before them (at position 0, the class)."""
        inputs = torch.where((place.positions == 0)[..., None], label[:, None], self.embed(tokens))
        hidden = inputs + self.positions[0, place.positions]
        for layer, block in enumerate(self.encoder):
            hidden = block(hidden, place.mask, None if cache is None else (cache, layer, place))
        normed: Tensor = self.encoder_norm(hidden)
        return normed
