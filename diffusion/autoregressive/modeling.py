"""Masked and causal autoregressive image models over continuous tokens, as a transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from diffusion.autoregressive.backbones import CausalBackbone, MaskedBackbone
from diffusion.autoregressive.configuration import MARConfig
from diffusion.autoregressive.heads import DiffusionHead, MixtureHead, ZeroLinear
from diffusion.autoregressive.layers import Place

NO_BACKBONE = (
    'this model has attention="shared": it is a head without a backbone, and cannot draw alone; generate with its '
    "target, and pass it to ContinuousSpeculation as the draft"
)
UNCONDITIONAL = -1
"""The label of nothing in particular."""


class MARModel(PreTrainedModel):  # type: ignore[misc]  # transformers is untyped here
    """A backbone that turns visible tokens into conditions, and a head that draws tokens given conditions.

    Source: Li et al. 2024, "Autoregressive Image Generation without Vector Quantization", arXiv:2406.11838.
    `mmaccel convert mar` turns the published weights into a checkpoint of this class.
    """

    config_class = MARConfig
    base_model_prefix = "mar"
    main_input_name = "tokens"
    _no_split_modules = ("Block", "AdaptiveBlock")

    def __init__(self, config: MARConfig) -> None:
        super().__init__(config)
        self.backbone: MaskedBackbone | CausalBackbone | None = None
        if config.attention != "shared":
            self.labels = nn.Embedding(config.classes, config.hidden_size)
            self.unconditional = nn.Parameter(torch.zeros(1, config.hidden_size))
            self.backbone = MaskedBackbone(config) if config.attention == "masked" else CausalBackbone(config)
        self.head = DiffusionHead(config) if config.head == "diffusion" else MixtureHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights of standard deviation 0.02, Xavier's in linear layers, and zeros where a block begins."""
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, MaskedBackbone | CausalBackbone | MARModel):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=0.02)

    def embed_labels(self, labels: Int[Tensor, "rows"]) -> Float[Tensor, "rows width"]:
        """The class embeddings; the label -1 stands for none."""
        embedded: Tensor = torch.where(
            (labels == UNCONDITIONAL)[:, None], self.unconditional, self.labels(labels.clamp_min(0))
        )
        return embedded

    def forward(
        self,
        tokens: Float[Tensor, "rows tokens size"],
        labels: Int[Tensor, "rows"],
        visible: Tensor | None = None,
    ) -> Float[Tensor, "rows tokens width"]:
        """The conditions of all positions, from tokens in reading order.

        visible: [rows, tokens], which tokens a masked model sees; a causal one sees those before each position.
        Raises ValueError for a model without a backbone.
        """
        if self.backbone is None:
            raise ValueError(NO_BACKBONE)
        label = self.embed_labels(labels)
        if isinstance(self.backbone, MaskedBackbone):
            if visible is None:
                raise ValueError("a masked model needs visible, [rows, tokens] of booleans: which tokens it sees")
            conditions: Tensor = self.backbone(tokens, visible, label)
            return conditions
        rows = torch.arange(len(tokens), device=tokens.device)
        positions = repeat(torch.arange(tokens.shape[1], device=tokens.device), "n -> rows n", rows=len(rows))
        return self.backbone(tokens.roll(1, dims=1), label, Place(rows, positions))  # type: ignore[no-any-return]

    def loss(self, tokens: Tensor, labels: Tensor, generator: Generator | None = None, repeats: int = 1) -> Tensor:
        """The head's mean loss on tokens in reading order, [rows, tokens, size]; the label -1 trains guidance.

        Masked models hide 70 to 100 % of the tokens, the same number in every row, and learn those.
        repeats: how many random noises each token is learnt with.
        """
        rows, count, _ = tokens.shape
        hidden = torch.ones(rows, count, dtype=torch.bool, device=tokens.device)
        if isinstance(self.backbone, MaskedBackbone):
            share = nn.init.trunc_normal_(torch.empty(1), mean=1.0, std=0.25, a=0.7, b=1.0, generator=generator)
            ranks = torch.rand(rows, count, generator=generator).argsort(dim=1).to(tokens.device)
            hidden = ranks < int((count * share).ceil())
        conditions = self(tokens, labels, ~hidden)[hidden]
        loss: Tensor = self.head.loss(conditions.repeat(repeats, 1), tokens[hidden].repeat(repeats, 1), generator)
        return loss.mean()

    def generate(
        self,
        labels: int | Sequence[int] | Tensor | None = None,
        num_images: int | None = None,
        *,
        generator: Generator | Sequence[Generator] | None = None,
        **settings: Any,
    ) -> Float[Tensor, "images channels height width"]:
        """Draws images, in the autoencoder's latents (or in pixels, if the model was trained on those).

        labels: classes, e.g. [3, 7]; None draws without.  num_images: in all, label after label, the same number each;
        one a label unless you say.
        generator: one for all, or one an image, which then does not depend on the others.
        settings: see `Sampling`: guidance, guidance_schedule, temperature, steps, diffusion_steps.
        Raises ValueError for settings that no image can be drawn with.
        """
        from diffusion.autoregressive.sampling import generate

        return generate(self, labels, num_images, generator, **settings)

    def to_tokens(self, latents: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images tokens size"]:
        """Latents, as the autoencoder gives them, cut into tokens in reading order."""
        tokens: Tensor = rearrange(
            latents * self.config.latent_scale,
            "images channels (rows down) (columns right) -> images (rows columns) (channels down right)",
            down=self.config.patch_size,
            right=self.config.patch_size,
        )
        return tokens

    def to_latents(self, tokens: Float[Tensor, "images tokens size"]) -> Float[Tensor, "images channels height width"]:
        """What `to_tokens` cut, put together again."""
        side, patch = self.config.grid, self.config.patch_size
        latents: Tensor = rearrange(
            tokens,
            "images (rows columns) (channels down right) -> images channels (rows down) (columns right)",
            rows=side, columns=side, down=patch, right=patch,
        )  # fmt: skip
        return latents / float(self.config.latent_scale)
