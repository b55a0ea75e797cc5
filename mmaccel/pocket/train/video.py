"""pocket-video: an `AnimateDiffPipeline` of 8 frames at 32 px, on pocket-ddim's network and autoencoder.

Recipe, seeds 25 and 27: 1500 steps and then 4000 of 4 clips of one or two things, motion modules and all other weights
together; averaged weights. That is not enough: of 40 held-out prompts it gets 5 % right at the first try, so no weights
of it are shipped yet.

It speaks five words that pocket-clip lacks; their embeddings in its text encoder are random.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, UNetMotionModel
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPTextModel

from mmaccel.pocket import motion, world
from mmaccel.pocket.train.autoencoder import to_samples
from mmaccel.pocket.train.common import Recipe, Stage
from mmaccel.pocket.train.ddim import make_scheduler
from mmaccel.pocket.train.diffusion import (
    DROPPED,
    Averaged,
    make_text_tokenizer,
    noise_like,
    text_encoder,
    to_latents,
    write_pipeline,
)

RECIPE = Recipe(seed=25, steps=1500, rate=1e-3)
MORE = Recipe(seed=27, steps=4000, rate=1e-3, warmup=100, decay=0.6)
BATCH = 4
WORDS = ("moving", "standing", "still", "up", "down")  # which pocket-clip does not know
DEFAULTS = {
    "guidance_scale": 2.5,
    "num_inference_steps": 20,
    "num_frames": motion.FRAMES,
    "height": 32,
    "width": 32,
}


def make_model(unet: Any) -> UNetMotionModel:
    """Pocket-ddim's network with a motion module behind each of its blocks, which at first changes nothing."""
    adapter = MotionAdapter(
        block_out_channels=unet.config.block_out_channels,
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=8,
        motion_max_seq_length=motion.FRAMES,
    )
    for name, parameter in adapter.named_parameters():
        if ".proj_out." in name:
            nn.init.zeros_(parameter)
    return UNetMotionModel.from_unet2d(unet, adapter)


def make_text_encoder(clip: Any, tokens: int) -> Any:
    """Pocket-clip's, with random embeddings for the words that it does not know."""
    encoder = text_encoder(clip, CLIPTextModel)
    encoder.resize_token_embeddings(tokens, mean_resizing=False)
    spread = clip.text_model.embeddings.token_embedding.weight.std()
    nn.init.normal_(encoder.get_input_embeddings().weight[-len(WORDS) :], std=spread.item())
    return encoder.requires_grad_(False).eval()


def sample_clips(rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
    """Clips in [-1, 1], [clips frames, 3, height, width], with prompts, one in ten of them empty."""
    scenes = [motion.sample_moving(rng) for _ in range(count)]
    pictures = to_samples([frame for scene in scenes for frame in motion.render_moving(scene)])
    return pictures, ["" if rng.random() < DROPPED else motion.caption(scene) for scene in scenes]


class Run(nn.Module):
    """The model, and what it needs beside it while it learns."""

    def __init__(self, clip: Any, ddim: Any) -> None:
        super().__init__()
        torch.manual_seed(RECIPE.seed)
        tokenizer = make_text_tokenizer(WORDS)
        self.text = make_text_encoder(clip, len(tokenizer))
        self.denoiser = Averaged(make_model(ddim.unet))
        self.pipeline = AnimateDiffPipeline(
            vae=ddim.vae.requires_grad_(False),
            text_encoder=self.text,
            tokenizer=tokenizer,
            unet=self.denoiser.average,
            motion_adapter=None,
            scheduler=make_scheduler(),
        )

    def stages(self) -> list[Stage]:
        recipes = {"noise": RECIPE, "more": MORE}
        return [
            Stage(name, recipe, partial(self.losses_at, recipe.seed), [self.denoiser.model])
            for name, recipe in recipes.items()
        ]

    def losses_at(self, seed: int, step: int) -> dict[str, Tensor]:
        rng = world.train_rng(seed, step)
        self.denoiser.update(step)
        pictures, prompts = sample_clips(rng, BATCH)
        latents = rearrange(
            to_latents(self.pipeline.vae, pictures),
            "(clip frame) channel height width -> clip channel frame height width",
            clip=BATCH,
        )
        noise, times = noise_like(latents, rng), torch.from_numpy(rng.integers(0, 1000, BATCH))
        with torch.no_grad():
            text, _ = self.pipeline.encode_prompt(prompts, torch.device("cpu"), 1, False)
        noisy = self.pipeline.scheduler.add_noise(latents, noise, times)
        text = text.repeat_interleave(motion.FRAMES, dim=0)
        guess = self.denoiser.model(noisy, times, encoder_hidden_states=text).sample
        return {"noise": (guess - noise).square().mean()}

    def save(self, folder: Path) -> None:
        write_pipeline(self.pipeline, folder, DEFAULTS)
