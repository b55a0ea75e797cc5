"""pocket-imagegpt: transformers' `ImageGPTForCausalImageModeling`, which draws one coloured shape at 32 px.

Recipe, seed 41: a codebook of 256 patches of 2 x 2 pixels, by k-means over 600 scenes; 256 tokens a picture in raster
order.  Behind the 256 codes come 24 words for the pairs of shape and colour, and the class's word that starts a
picture, which stands for any: each picture follows one of these.  2.8 M parameters, 500 steps of 8 pictures, about one
second each on one core; embeddings begin with what they stand for, without which as many steps learn nothing but lines.
Weights are averaged.

Figures: the judge found the label's thing alone in 8 of 48 pictures.  With windows of 16 speculative Jacobi decoding
took 5.1 times fewer passes for a picture by independent redraws and 4.3 by coupled ones; 2.8 and 2.5 times as fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

import mmaccel
from diffusion.autoregressive.codebooks import Codebook, clustered
from diffusion.autoregressive.jacobi import SpeculativeJacobi
from diffusion.autoregressive.training import LABELS, NAMES, UNLABELLED
from mmaccel.pocket import world
from mmaccel.pocket.train.autoencoder import PIXELS, to_samples
from mmaccel.pocket.train.common import Recipe, Stage
from mmaccel.pocket.train.diffusion import Averaged

NEEDED = ()
RECIPE = Recipe(seed=41, steps=500, warmup=60)
BATCH, CLUSTERED = 8, 600
CODES, PATCH = 256, 2
SPREAD = 0.06  # of weights at first
PLACES = (PIXELS // PATCH) ** 2
ANY = CODES + len(LABELS)  # the word that starts a picture of any label


def make_model() -> ImageGPTForCausalImageModeling:
    """2.8 M parameters."""
    return ImageGPTForCausalImageModeling(
        ImageGPTConfig(
            vocab_size=ANY + 1, n_positions=PLACES, n_embd=192, n_layer=6, n_head=6, initializer_range=SPREAD,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=ANY,
        )
    )  # fmt: skip


@torch.no_grad()
def begin(model: Any, clusters: Tensor) -> None:
    """Embeddings that tell of colours, shapes and places from the first step on; all of them are learnt further."""
    words, output, places = model.transformer.wte.weight, model.lm_head.weight, model.transformer.wpe.weight
    colours = torch.tensor([world.PALETTE[colour] for _, colour in LABELS]) / 127.5 - 1
    seen = torch.cat([clusters, colours.repeat(1, PATCH**2)])
    seen = (seen - clusters.mean(dim=0)) / clusters.std(dim=0)
    meant = SPREAD * seen @ torch.randn(seen.shape[1], words.shape[1]) / seen.shape[1] ** 0.5
    shapes = SPREAD * torch.randn(len(world.SHAPES), words.shape[1])
    words[:CODES] += meant[:CODES]
    output[:CODES] += meant[:CODES]
    words[CODES:ANY] = meant[CODES:] + shapes[[world.SHAPES.index(shape) for shape, _ in LABELS]]
    side = PIXELS // PATCH
    rates = side ** -torch.linspace(0, 1, words.shape[1] // 4)
    angles = [place[:, None] * rates for place in (torch.arange(PLACES) // side, torch.arange(PLACES) % side)]
    places[:] = SPREAD * 2**0.5 * torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def prompt(label: int | None) -> Tensor:
    """What a picture follows: [1, 1].  label: which of `LABELS`, or None for any."""
    return torch.tensor([[ANY if label is None else CODES + label]])


def sample_pictures(rng: np.random.Generator, count: int) -> tuple[Tensor, list[int]]:
    """Pictures of one thing each in [-1, 1], and their labels."""
    scenes = [world.sample_prompt(rng, "one")[1] for _ in range(count)]
    labels = [LABELS.index((thing.shape, thing.colour)) for (thing,) in (scene.things for scene in scenes)]
    return to_samples([world.render(scene, PIXELS, texture=False) for scene in scenes]), labels


class Run(nn.Module):
    """The model while it learns, and its codebook."""

    clusters: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(RECIPE.seed)
        pictures, _ = sample_pictures(world.train_rng(RECIPE.seed, RECIPE.steps), CLUSTERED)
        self.register_buffer("clusters", clustered(pictures, CODES, PATCH, RECIPE.seed).clusters)
        model = make_model()
        begin(model, self.clusters)
        self.model = Averaged(model)

    def stages(self) -> list[Stage]:
        return [Stage("tokens", RECIPE, self.losses_at, [self.model.model])]

    def losses_at(self, step: int) -> dict[str, Tensor]:
        self.model.update(step)
        rng = world.train_rng(RECIPE.seed, step)
        pictures, labels = sample_pictures(rng, BATCH)
        codes = Codebook(self.clusters).encode(pictures)
        prompts = torch.cat([prompt(None if rng.random() < UNLABELLED else label) for label in labels])
        logits = self.model.model(input_ids=torch.cat([prompts, codes[:, :-1]], dim=1)).logits
        return {"surprise": functional.cross_entropy(logits.flatten(0, 1), codes.flatten())}

    def save(self, folder: Path) -> None:
        model: Any = self.model.average
        settings = model.generation_config
        settings.do_sample, settings.max_new_tokens, settings.top_k = True, PLACES, 0
        settings.suppress_tokens = list(range(CODES, ANY))  # words of labels are no part of a picture
        model.config.id2label = NAMES
        model.half().save_pretrained(folder)
        model.float()
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
        (folder / "model.safetensors").chmod(0o644)
        Codebook(self.clusters).save(folder)


def figures(weights: Path, images: int = 48) -> dict[str, float]:
    """How often the judge finds the label's thing alone in a picture, and what speculation gives at batch 1."""
    model: Any = ImageGPTForCausalImageModeling.from_pretrained(weights).eval()
    codebook = Codebook.from_pretrained(weights)
    torch.manual_seed(RECIPE.seed)
    wanted = [label for label in range(len(LABELS)) for _ in range(images // len(LABELS))]
    tokens = model.generate(torch.cat([prompt(label) for label in wanted]))[:, 1:]
    drawn = ((codebook.decode(tokens) + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    right = [
        [(thing.shape, thing.colour) for thing in world.parse(picture).things] == [LABELS[label]]
        for picture, label in zip(drawn, wanted, strict=True)
    ]
    found = {"right": sum(right) / len(wanted)}
    for redraw in ("independent", "coupled"):
        with mmaccel.applied(model, SpeculativeJacobi(redraw=cast(Any, redraw))) as run:
            model.generate(prompt(0))
        found |= {f"{redraw}_{name}": float(run.report[name]) for name in ("tokens_a_pass", "speed_up")}
    return found
