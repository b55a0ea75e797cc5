"""Heads: from a position's condition to the law of its token.

A head makes a *law* of conditions [branches, rows, width], where the second branch, if there is one, is unconditional
and `guidance` says how far to go from it towards, and past, the first; `temperature` multiplies standard deviations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from diffusion.autoregressive.chains import Gaussians
from diffusion.autoregressive.configuration import MARConfig
from diffusion.autoregressive.mixtures import MixtureLaw
from diffusion.autoregressive.noise_schedule import respaced, training_levels

FREQUENCIES = 256
AT_ONCE = 2**25  # numbers that a law may keep to save computing them step by step


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, so that a fresh block changes nothing."""


class AdaptiveBlock(nn.Module):
    """A residual block whose shift, scale and gate follow from time and condition (adaLN-zero, arXiv:2212.09748)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = ZeroLinear(width, 3 * width)

    def forward(self, hidden: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """scale: 1 changes nothing."""
        return torch.addcmul(hidden, gate, self.mlp(torch.addcmul(shift, self.norm(hidden), scale)))


class DiffusionHead(nn.Module):
    """A small network that denoises one token, given time and condition.

    It predicts epsilon or the velocity, and with `variance="learned"` how far the log variance of a step lies between
    that of the posterior (0) and beta (1), as in arXiv:2102.09672, equation 15, unclamped.
    "fixed-large" steps have variance beta, which keeps the laws of two heads closest; "fixed-small" the posterior's.
    Source: arXiv:2406.11838, section 3.2; velocity, log-SNR levels and a noisy end are ours.
    """

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        width, size = config.head_width, config.token_size
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(config.hidden_size, width)
        self.input = nn.Linear(size, width)
        self.blocks = nn.ModuleList(AdaptiveBlock(width) for _ in range(config.head_layers))
        self.final_modulation = ZeroLinear(width, 2 * width)
        self.output = ZeroLinear(width, size * (2 if config.variance == "learned" else 1))

    def forward(self, state: Tensor, modulations: Tensor) -> Tensor:
        """The raw output for tokens [..., size], given what `modulations` makes of their times and conditions."""
        parts = modulations.chunk(3 * len(self.blocks) + 2, dim=-1)
        hidden = self.input(state)
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, *parts[3 * number : 3 * number + 3])
        output: Tensor = self.output(
            torch.addcmul(parts[-2], functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-6), parts[-1])
        )
        return output

    def modulations(self, time: Tensor, condition: Tensor) -> Tensor:
        """Shift, scale and gate of every block, shift and scale of the last, [..., (3 blocks + 2) width].

        They follow from embedded times and conditions alone, so one call serves all steps of a token.
        """
        signal = functional.silu(time + condition)
        parts: list[nn.Module] = [*(block.get_submodule("modulation") for block in self.blocks), self.final_modulation]
        found = torch.cat([part(signal) for part in parts], dim=-1)
        return found + self.no_scaling()

    def no_scaling(self) -> Tensor:
        """1 where modulations scale, else 0."""
        ones = torch.zeros(3 * len(self.blocks) + 2, self.config.head_width)
        ones[1::3] = 1
        return ones.flatten().to(self.input.weight)

    def embed_time(self, times: Tensor) -> Tensor:
        """[levels] in 0..1000 -> [levels, width]."""
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half, device=times.device) / half)
        angles = times[:, None].to(rates) * rates
        embedded: Tensor = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.input.weight))
        return embedded

    def laws(self, temperature: float, steps: int) -> Callable[[Tensor, Tensor], DiffusionLaw]:
        """The function that makes the chains of conditions and guidance, for a whole run with these settings."""
        schedule = respaced(self.config.noise_schedule, steps)
        like = self.input.weight
        times = self.embed_time(schedule.times.to(like.device))
        large, small = schedule.betas.log(), schedule.posterior_variance.log()
        tables = torch.stack([*schedule.mean_weights(self.config.prediction), large, small]).to(like)
        linear = torch.stack([schedule.x_weight, schedule.x0_weight]).to(like)
        fixed = {"fixed-large": large, "fixed-small": small}.get(self.config.variance)
        stds = None if fixed is None else temperature * (fixed.to(like) / 2).exp()

        def law(conditions: Tensor, guidance: Tensor) -> DiffusionLaw:
            seen = self.condition(conditions)
            made = None
            if steps * seen.numel() * (3 * len(self.blocks) + 2) <= AT_ONCE:
                made = self.modulations(times[:, None, None], seen)
            return DiffusionLaw(self, tables, linear, stds, times, seen, made, guidance.to(like), temperature)

        return law

    def loss(self, conditions: Tensor, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The mean square error of the prediction, [rows], at random levels: conditions [rows, width], tokens."""
        if self.config.variance == "learned":
            raise ValueError('heads are trained with a fixed variance here; set variance="fixed-large"')
        state, times, signal, noise, epsilon = self._noisy(tokens, generator)
        aim = epsilon if self.config.prediction == "epsilon" else signal * epsilon - noise * tokens
        made = self(state, self.modulations(self.embed_time(times), self.condition(conditions)))
        loss: Tensor = (made - aim).square().mean(dim=-1)
        return loss

    def _noisy(self, tokens: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        times, products = training_levels(self.config.noise_schedule, len(tokens), generator)
        signal, noise = (root.sqrt().to(tokens)[:, None] for root in (products, 1 - products))
        epsilon = torch.randn(tokens.shape, generator=generator, dtype=tokens.dtype).to(tokens.device)
        return signal * tokens + noise * epsilon, times.to(tokens.device), signal, noise, epsilon


@dataclass(frozen=True)
class DiffusionLaw:
    """The chain of a diffusion head for some rows: see `chains.Chain`.

    tables: by step, the weights of state and prediction in the mean, and the logs of the two extreme variances.
    linear: by step, the weights of state and clean token in the mean.
    stds: by step, unless they are learnt.  times, conditions: embedded.  modulations: of all steps, if they are few.
    """

    head: DiffusionHead
    tables: Float[Tensor, "4 steps"]
    linear: Float[Tensor, "2 steps"]
    stds: Float[Tensor, "steps"] | None
    times: Float[Tensor, "steps width"]
    conditions: Float[Tensor, "branches rows width"]
    modulations: Float[Tensor, "steps branches rows parts"] | None
    guidance: Float[Tensor, "rows"]
    temperature: float

    @property
    def steps(self) -> int:
        return len(self.times)

    @property
    def size(self) -> int:
        return int(self.head.config.token_size)

    @property
    def noisy_end(self) -> bool:
        return bool(self.head.config.noisy_end)

    @property
    def fixed(self) -> Tensor:
        if self.stds is None:
            raise ValueError("this head learns its variance, so no step has a std of its own; draft step by step")
        return torch.cat([self.linear, self.stds[None]])

    def at(self, rows: Int[Tensor, "chosen"]) -> DiffusionLaw:
        made = None if self.modulations is None else self.modulations[:, :, rows]
        return replace(self, conditions=self.conditions[:, rows], modulations=made, guidance=self.guidance[rows])

    def __call__(self, states: Float[Tensor, "levels rows size"], indices: Int[Tensor, "levels"]) -> Gaussians:
        indices = indices.to(self.times.device)
        if self.modulations is None:
            modulations = self.head.modulations(self.times[indices, None, None], self.conditions)
        else:
            modulations = self.modulations[indices]
        output = self.head(states[:, None], modulations)
        made = output[:, 0]
        if len(self.conditions) == 2:
            made = output[:, 1] + self.guidance[:, None] * (made - output[:, 1])
        state_weight, predicted_weight, log_large, log_small = self.tables[:, indices, None, None]
        if self.stds is not None:
            std = self.stds[indices, None, None]
        else:
            made, share = made[..., : self.size], (output[:, 0, :, self.size :] + 1) / 2
            std = self.temperature * ((share * log_large + (1 - share) * log_small) / 2).exp()
        return Gaussians(torch.addcmul(state_weight * states, predicted_weight, made), std.expand_as(states))


class MixtureHead(nn.Module):
    """A Gaussian mixture with diagonal covariances, from one linear layer (GIVT, arXiv:2312.02116, section 3.2).

    Guidance moves log weights and means from the unconditional to the conditional ones and past them, and keeps the
    conditional scales: ours, as a guided density is no mixture in general.
    """

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        self.output = nn.Linear(config.hidden_size, config.mixtures * (1 + 2 * config.token_size))

    def laws(self, temperature: float, steps: int) -> Callable[[Tensor, Tensor], MixtureLaw]:
        """The function that makes the mixtures of conditions and guidance.  steps: has no meaning here."""
        return functools.partial(self.law, temperature=temperature)

    def law(self, conditions: Tensor, guidance: Tensor, temperature: float) -> MixtureLaw:
        """The mixtures that the tokens of these conditions, [branches, rows, width], are drawn from."""
        mixtures, size = self.config.mixtures, self.config.token_size
        weights, means, scales = self.output(conditions).split([mixtures, mixtures * size, mixtures * size], dim=-1)
        logits, mean = weights[0], means[0]
        if len(conditions) == 2:
            strength = guidance.to(conditions)[:, None]
            logits = weights[1] + strength * (logits - weights[1])
            mean = means[1] + strength * (mean - means[1])
        shape = "rows (mixtures size) -> rows mixtures size"
        std = temperature * (functional.softplus(scales[0]) + 1e-3)
        return MixtureLaw(
            logits.log_softmax(dim=-1),
            Gaussians(rearrange(mean, shape, mixtures=mixtures), rearrange(std, shape, mixtures=mixtures)),
        )

    def loss(self, conditions: Tensor, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Minus the log density, [rows]."""
        law = self.law(conditions[None], torch.ones(len(tokens)), 1.0)
        return -law.log_density(tokens).to(tokens)
