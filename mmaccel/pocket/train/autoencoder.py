"""The `AutoencoderKL` that the drawing pocket models share: 32 px pictures as 8 x 8 latents of four channels.

Recipe, seed 21: 2500 steps of 16 scenes of one to four things, plain background; absolute and squared error and a small
Kullback-Leibler term. At the end the latents' mean is folded into the two convolutions beside them, so that
`scaling_factor` alone makes them standard: pipelines that know no `shift_factor` can use it, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from mmaccel.pocket import world
from mmaccel.pocket.train.common import Recipe, Stage

PIXELS = 32
RECIPE = Recipe(seed=21, steps=2500, rate=2e-3, weight_decay=0.0)
BATCH = 16


def to_samples(images: list[world.Image]) -> Tensor:
    """Pictures as diffusers' image processors make them: [images, 3, height, width] in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_model() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=PIXELS,
        shift_factor=0.0,
    )


def sample_pictures(rng: np.random.Generator, count: int) -> list[world.Image]:
    return [world.render(world.sample_scene(rng, (1, 4), world.DRAWN), PIXELS, texture=False) for _ in range(count)]


@torch.no_grad()
def standardise(model: Any, pictures: Tensor) -> float:
    """Move the latents of these pictures to zero mean, changing no decoded picture; returns one over their spread."""
    latents = model.encode(pictures).latent_dist.mean
    mean = latents.mean((0, 2, 3))
    model.quant_conv.bias[: len(mean)] -= mean
    after = model.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ mean
    return round(1 / float((latents - mean[:, None, None]).std()), 4)


class Run(nn.Module):
    """The model while it learns."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(RECIPE.seed)
        self.model = make_model()
        self.register_buffer("scale", torch.zeros(()))  # of the latents, once they are standard

    def stages(self) -> list[Stage]:
        return [Stage("pictures", RECIPE, self.losses_at, [self.model])]

    def losses_at(self, step: int) -> dict[str, Tensor]:
        rng = world.train_rng(RECIPE.seed, step)
        pictures = to_samples(sample_pictures(rng, BATCH))
        latents: Any = self.model.encode(pictures).latent_dist
        noise = torch.from_numpy(rng.standard_normal(latents.mean.shape, dtype=np.float32))
        error = self.model.decode(latents.mean + latents.std * noise).sample - pictures
        return {
            "absolute": error.abs().mean(),
            "squared": error.square().mean(),
            "divergence": 2e-4 * latents.kl().mean() / latents.mean[0].numel(),
        }

    def standard(self) -> AutoencoderKL:
        """The trained model at rest, with latents of zero mean and known scale."""
        if self.model.training:
            self.model.requires_grad_(False).eval()
            if not self.scale:
                pictures = to_samples(sample_pictures(world.train_rng(RECIPE.seed, RECIPE.steps), 300))
                self.scale.fill_(standardise(self.model, pictures))
            self.model.register_to_config(scaling_factor=round(self.scale.item(), 4))
        return self.model
