"""pocket-turbo: pocket-flow distilled into a `StableDiffusion3Pipeline` that needs few steps and no guidance.

What posterior means promise, searches of flow models build on; they are sharp where a model needs few steps, and
pocket-flow is none of these.  So this one learns the straight lines between noises and the pictures that pocket-flow,
guided, makes of them (rectified flow, Liu et al., arXiv:2209.03003, section 2.2; guidance distilled with it, Meng et
al., arXiv:2210.03142), of two pictures for a prompt the one that the judge grades higher.

Recipe, seed 28: 1000 steps of 8 pairs at 6 noise levels each, from pocket-flow's weights; averaged weights.

`mmaccel.pocket.train.drawing.of("pocket-turbo", mmaccel.pocket.path("pocket-turbo"))` measures the figures.

Prompts whose first picture the judge accepts, of 200 held-out ones, in %, and the mean grade; without guidance:

| steps | count | pair | trio | relation |  all | grade |
|    10 |    46 |   24 |    6 |        2 | 19.5 |  0.59 |
|     4 |    38 |   18 |    4 |        0 | 15.0 |  0.57 |
|     1 |    18 |   10 |    0 |        0 |  7.0 |  0.43 |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import repeat
from torch import Tensor, nn

from mmaccel.pocket import world
from mmaccel.pocket.train.common import Recipe, Stage
from mmaccel.pocket.train.diffusion import LENGTH, Averaged, write_pipeline
from mmaccel.pocket.train.drawing import to_picture
from mmaccel.pocket.train.flow import make_pipeline

RECIPE = Recipe(seed=28, steps=1000, rate=5e-4, warmup=50, decay=0.6)
PROMPTS, TRIES, LEVELS = 8, 2, 6  # of a training step
STEPS, GUIDANCE = 8, 2.5  # with which the teacher draws
DEFAULTS = {"guidance_scale": 1.0, "num_inference_steps": 4, "max_sequence_length": 16}


class Run(nn.Module):
    """The student, which begins as its teacher, and what both need beside them."""

    def __init__(self, clip: Any, flow: Any) -> None:
        super().__init__()
        self.teacher = flow.transformer.requires_grad_(False).eval()
        self.pictures = flow.vae.requires_grad_(False).eval()
        self.student = Averaged(type(self.teacher).from_config(self.teacher.config))
        for model in (self.student.model, self.student.average):
            model.load_state_dict(self.teacher.state_dict())
        self.pipeline = make_pipeline(self.student.average, self.pictures, clip)

    def stages(self) -> list[Stage]:
        return [Stage("turbo", RECIPE, self.losses_at, [self.student.model])]

    def losses_at(self, step: int) -> dict[str, Tensor]:
        """The velocity from pictures to their noises, at levels that are denser where there is more noise.

        Every twelfth step has as many zero tokens behind the text as a plain call.
        """
        rng = world.train_rng(RECIPE.seed, step)
        self.student.update(step)
        zeros, count = (256, PROMPTS // 2) if step % 12 == 11 else (4, PROMPTS)
        text, pooled, noise, latents = self.pairs(rng, count, zeros)
        text, pooled, noise, latents = (
            repeat(tensor, "pairs ... -> (pairs levels) ...", levels=LEVELS)
            for tensor in (text, pooled, noise, latents)
        )
        sigma = torch.from_numpy(rng.random(len(noise), dtype=np.float32)).sqrt()[:, None, None, None]
        noisy = (1 - sigma) * latents + sigma * noise
        velocity = _velocity(self.student.model, noisy, sigma.flatten(), text, pooled)
        return {"turbo": (velocity - (noise - latents)).square().mean()}

    @torch.no_grad()
    def pairs(self, rng: np.random.Generator, count: int, zeros: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Prompts as the model reads them, noises, and the latents that the teacher leads these to."""
        prompts = sample_prompts(rng, count)
        text, _, pooled, _ = self.pipeline.encode_prompt(
            [*prompts, ""], None, None, do_classifier_free_guidance=False, max_sequence_length=256
        )
        tried = torch.arange(count).repeat_interleave(TRIES)
        noise = torch.from_numpy(rng.standard_normal((len(tried), 4, 8, 8), dtype=np.float32))
        ends = self.drawn(noise, text[:, : LENGTH + 4], pooled, tried)
        samples = self.pictures.decode(ends / self.pictures.config.scaling_factor).sample
        images = to_picture((samples.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy())
        grades = [world.score(prompts[row // TRIES], world.parse(image)) for row, image in enumerate(images)]
        best = torch.tensor(grades).view(count, TRIES).argmax(dim=1) + TRIES * torch.arange(count)
        return text[:count, : LENGTH + zeros], pooled[:count], noise[best], ends[best]

    def drawn(self, noise: Tensor, text: Tensor, pooled: Tensor, tried: Tensor) -> Tensor:
        """The teacher's latents: Euler steps, guided away from the empty prompt, the last of `text`."""
        asked = torch.cat([tried, torch.full_like(tried, len(text) - 1)])
        latents = noise
        for step in range(STEPS):
            sigma = torch.full((len(asked),), 1 - step / STEPS)
            with_prompt, without = _velocity(
                self.teacher, latents.repeat(2, 1, 1, 1), sigma, text[asked], pooled[asked]
            ).chunk(2)
            latents = latents - (without + GUIDANCE * (with_prompt - without)) / STEPS
        return latents

    def save(self, folder: Path) -> None:
        write_pipeline(self.pipeline, folder, DEFAULTS)


def sample_prompts(rng: np.random.Generator, count: int) -> list[str]:
    """Prompts as pocket-flow's training has them, none empty."""
    kinds = rng.choice(world.PROMPTS, size=count, p=(0.1, 0.3, 0.2, 0.2, 0.2))
    return [world.sample_prompt(rng, str(kind))[0] for kind in kinds]


def _velocity(model: Any, latents: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    velocity: Tensor = model(
        hidden_states=latents, timestep=1000 * sigma, encoder_hidden_states=text, pooled_projections=pooled
    ).sample
    return velocity
