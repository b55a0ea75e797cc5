"""How beautiful people would find a picture, by a head on CLIP embeddings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from diffusion.rewards.encoders import clip_encoder
from diffusion.rewards.inputs import ImageReward
from diffusion.rewards.models import shared
from mmaccel.checkpoints import first_line

Head = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, kw_only=True)
class Aesthetic(ImageReward):
    """How beautiful people would find a picture: a regression head on its CLIP embedding.

    LAION's heads give about 1 to 10.  model: the CLIP checkpoint folder that the head was trained on (LAION's:
    ViT-L/14).  head: a safetensors file of linear layers, `weight` and `bias`, or `layers.N.weight` and
    `layers.N.bias` one after another with nothing between them: the layouts of LAION-AI/aesthetic-predictor and of
    christophschuhmann/improved-aesthetic-predictor, whose .pth you convert once with safetensors.torch.save_file.
    Source: Schuhmann et al. 2022, LAION-5B (arXiv:2210.08402), its aesthetic predictors.
    """

    name: ClassVar[str] = "aesthetic"

    model: str | Path
    head: str | Path

    def score(
        self, images: Float[Tensor, "rows 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        features = clip_encoder(self.name, str(self.model), images.device).images(images)
        head = shared(_load_head, str(self.head), features.shape[-1], images.device)
        for weight, bias in head:
            features = functional.linear(features, weight, bias)
        return features.squeeze(-1)


def _load_head(file: str, channels: int, device: torch.device) -> Head:
    """The linear layers in a file.  Raises FileNotFoundError or ValueError that names the file and the mend."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    layout = "`weight` and `bias`, or `layers.N.weight` and `layers.N.bias`"
    if not Path(file).is_file():
        raise FileNotFoundError(f"aesthetic: there is no file {file!r}; give a safetensors file with {layout}")
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"aesthetic: {file} cannot be read as safetensors ({first_line(error)}); convert a .pth once with "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), new_file)"
        ) from None
    layers = [re.fullmatch(r"layers\.(\d+)\.(?:weight|bias)", key) for key in weights]
    numbers = sorted({int(layer[1]) for layer in layers if layer})
    prefixes = [f"layers.{number}." for number in numbers] or [""]
    expected = {prefix + part for prefix in prefixes for part in ("weight", "bias")}
    if set(weights) != expected:
        raise ValueError(f"aesthetic: {file} holds {', '.join(sorted(weights))}; expected {layout}")
    widths = [channels, *(weights[prefix + "bias"].shape[0] for prefix in prefixes)]
    shapes = [list(weights[prefix + "weight"].shape) for prefix in prefixes]
    wanted = [[after, before] for before, after in pairwise(widths)]
    if shapes != wanted or widths[-1] != 1:
        raise ValueError(
            f"aesthetic: the layers of {file} have the shapes {shapes}; expected a chain from the model's {channels} "
            f"channels to 1. Give the CLIP checkpoint that the head was trained on"
        )
    return tuple(
        (weights[prefix + "weight"].float().to(device), weights[prefix + "bias"].float().to(device))
        for prefix in prefixes
    )
