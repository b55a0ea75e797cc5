"""Tiny models with random weights, wide enough that every input matters, and the official ones of the golden files."""

from typing import Any

import torch
from torch import Tensor, nn

from diffusion.autoregressive import MARConfig, MARModel
from diffusion.autoregressive.convert import from_published, rename
from diffusion.autoregressive.heads import DiffusionHead
from tests.vision_tokens.golden import load

SHAPE = {
    "grid": 3,
    "channels": 2,
    "latent_scale": 0.5,
    "classes": 10,
    "hidden_size": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "attention_heads": 2,
    "buffer_tokens": 3,
    "head_width": 24,
    "head_layers": 1,
    "mixtures": 3,
    "prediction": "velocity",
    "variance": "fixed-large",
    "noise_schedule": "log-snr",
    "diffusion_steps": 3,
    "noisy_end": True,
}


def tiny(seed: int = 0, spread: float = 0.15, **settings: Any) -> MARModel:
    """A tiny model; by default a causal one with a diffusion head."""
    torch.manual_seed(seed)
    model = MARModel(MARConfig(**{**SHAPE, "attention": "causal", **settings})).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=spread)
    return model


def near(model: MARModel, distance: float = 0.02, seed: int = 9) -> MARModel:
    """A draft: the model with its weights moved a little."""
    torch.manual_seed(seed)
    draft = MARModel(model.config).eval()
    draft.load_state_dict(
        {name: value + distance * torch.randn_like(value) for name, value in model.state_dict().items()}
    )
    return draft


def seeds(*numbers: int) -> list[torch.Generator]:
    """A generator for each number."""
    return [torch.Generator().manual_seed(number) for number in numbers]


def published(name: str) -> MARModel:
    """`target` or `draft` of the golden files, whose sizes differ from the published ones as their metadata says."""
    weights, _ = load("mar_model/mar_tiny")
    return from_published(
        {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")},
        attention_heads={"target": 3, "draft": 2}[name],
        layer_norm_eps=1e-5,
        noise_schedule="linear",
        diffusion_steps=10,
        latent_scale=1.0,
    )


def official_head(name: str) -> DiffusionHead:
    """`target` or `draft` of the golden trajectories."""
    weights, _ = load("cspd/head_trajectory")
    given = {
        rename(f"diffloss.net.{key.removeprefix(f'{name}.')}").removeprefix("head."): value
        for key, value in weights.items()
        if key.startswith(f"{name}.")
    }
    width, hidden = given["condition.weight"].shape
    layers = len({key.split(".")[1] for key in given if key.startswith("blocks.")})
    config = MARConfig(
        grid=1, channels=4, hidden_size=hidden, head_width=width, head_layers=layers, attention_heads=1,
        noise_schedule="linear",
    )  # fmt: skip
    head = DiffusionHead(config)
    head.load_state_dict(given)
    return head.requires_grad_(False)


class Recorded:
    """Random numbers that were written down, given out one after the other.  other: what `beside` gives."""

    def __init__(self, *numbers: Tensor, other: "Recorded | None" = None) -> None:
        self.numbers, self.other = list(numbers), other

    def at(self, rows: Tensor) -> "Recorded":
        return self

    def normal(self, *shape: int) -> Tensor:
        number = self.numbers.pop(0)
        assert number.shape[1:] == shape
        return number

    def uniform(self) -> Tensor:
        return self.numbers.pop(0)

    def beside(self) -> "Recorded | None":
        return self.other
