"""Gaussian mixtures as laws of tokens: drawing and density in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from diffusion.autoregressive.chains import Draws, Gaussians


@dataclass(frozen=True)
class MixtureLaw:
    """One mixture a row.  log_weights: normalised.  components: [rows, mixtures, size]."""

    log_weights: Float[Tensor, "rows mixtures"]
    components: Gaussians

    def at(self, rows: Int[Tensor, "chosen"]) -> MixtureLaw:
        """The laws of the chosen rows, which may repeat."""
        return MixtureLaw(self.log_weights[rows], Gaussians(self.components.mean[rows], self.components.std[rows]))

    def log_density(self, tokens: Float[Tensor, "rows size"]) -> Float64[Tensor, "rows"]:
        """The log density of one token a row."""
        inside = self.components.log_density(tokens[:, None].expand_as(self.components.mean))
        return torch.logsumexp(self.log_weights.double() + inside, dim=-1)

    def draw(self, draws: Draws) -> Float[Tensor, "rows size"]:
        """One token a row: a component by its weight, then a Gaussian."""
        mean, std = self.components.mean, self.components.std
        steps = self.log_weights.double().exp().cumsum(dim=-1)
        position = draws.uniform().to(steps)[:, None] * steps[:, -1:]
        chosen = (steps <= position).sum(dim=-1).clamp_max(steps.shape[-1] - 1)
        row = torch.arange(len(chosen), device=chosen.device)
        return mean[row, chosen] + std[row, chosen] * draws.normal(mean.shape[-1]).to(mean)
