"""What the drawing pocket models share in training: their data, averaged weights, and how a pipeline is written."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmaccel.pocket import world
from mmaccel.pocket.train.autoencoder import PIXELS, to_samples
from mmaccel.pocket.train.common import make_tokenizer

LENGTH = 16  # tokens of a prompt; longer ones are cut
DROPPED = 0.1  # of the prompts are empty in training, for guidance


def make_text_tokenizer(more: Iterable[str] = ()) -> Any:
    """Pocket-clip's tokenizer for prompts of 16 tokens.  more: words that it lacks."""
    tokenizer = make_tokenizer(end=True, more=more)
    tokenizer.model_max_length = LENGTH
    return tokenizer


def text_encoder(clip: Any, kind: Any) -> Any:
    """Pocket-clip's text weights as a model of this class, frozen.  kind: `CLIPTextModel`, perhaps with projection."""
    config = copy.deepcopy(clip.config.text_config)
    config.projection_dim = clip.config.projection_dim
    encoder = kind(config)
    named = encoder.state_dict()
    encoder.load_state_dict({name: clip.state_dict()[_in_clip(name)] for name in named})
    return encoder.requires_grad_(False).eval()


def _in_clip(name: str) -> str:
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def sample_batch(rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
    """Pictures in [-1, 1] with prompts that say all of them, one in ten of them empty."""
    drawn = [
        world.sample_prompt(rng, str(rng.choice(world.PROMPTS, p=(0.1, 0.3, 0.2, 0.2, 0.2)))) for _ in range(count)
    ]
    pictures = to_samples([world.render(scene, PIXELS, texture=False) for _, scene in drawn])
    return pictures, ["" if rng.random() < DROPPED else prompt for prompt, _ in drawn]


@torch.no_grad()
def to_latents(vae: Any, pictures: Tensor) -> Tensor:
    """The means of the latents, scaled as the pipelines scale them."""
    latents: Tensor = vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor
    return latents


def noise_like(latents: Tensor, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))


class Averaged(nn.Module):
    """A model beside the exponential moving average of its weights, which is what ships."""

    def __init__(self, model: nn.Module, keep: float = 0.998) -> None:
        super().__init__()
        self.model, self.average, self.keep = model, copy.deepcopy(model).requires_grad_(False), keep

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call before each step of training; the first steps count for less."""
        weight = 1 - min(self.keep, (1 + step) / (10 + step))
        for mine, theirs in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mine.lerp_(theirs, weight)


def write_pipeline(pipeline: Any, folder: Path, defaults: Mapping[str, Any]) -> None:
    """Write a pipeline with float16 weights, and its call's defaults as `call.json`."""
    for model in pipeline.components.values():
        if isinstance(model, nn.Module):
            model.half()
    pipeline.save_pretrained(folder)
    for model in pipeline.components.values():
        if isinstance(model, nn.Module):
            model.float()
    for config in folder.glob("*/config.json"):
        settings = json.loads(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
        settings.pop("_name_or_path", None)  # where this component was loaded from
        config.write_text(json.dumps(settings, indent=2) + "\n")
    index = folder / "model_index.json"  # by the name that diffusers 0.42 knows of this class of transformers 5
    index.write_text(index.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    for file in folder.glob("*/*.safetensors"):
        file.chmod(0o644)
    (folder / "call.json").write_text(json.dumps(defaults, indent=2) + "\n")
