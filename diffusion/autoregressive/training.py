"""pocket-mar: a causal model that draws one coloured shape at 32 px, in pocket-flow's latents, and a draft for it.

Recipe, seed 31: labels are the 24 pairs of shape and colour, one in ten left away; 64 tokens of 4 numbers, in raster
order.  The target (9.6 M parameters) learns velocities at log-SNRs in [-6.5, 6.5], each token at two of them: 2000
steps of 16 pictures, about 1.5 s each on one core.  The draft (0.67 M) is a head over the target's backbone and learns,
on pictures that the target draws, what decides how many drafts are kept: 1500 steps of 96 tokens, 0.4 s each, half of
them guided, and 48 new pictures every 300 steps.  Weights are averaged.  Steps are sampled with the larger variance and
a noisy end.  The draft lies in the folder `draft` of the target's.

Figures: at guidance 2 the judge found the label's thing alone in 19 of 48 plain pictures.  At the end of training at
most 0.21 of the draft's tokens would have been rejected, 0.26 with guidance; see docs/measured.md.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import mmaccel
from diffusion.autoregressive.chains import reread, walk
from diffusion.autoregressive.configuration import MARConfig
from diffusion.autoregressive.heads import DiffusionHead, DiffusionLaw
from diffusion.autoregressive.modeling import UNCONDITIONAL, MARModel
from diffusion.autoregressive.randomness import Randomness
from diffusion.autoregressive.speculation import ContinuousSpeculation
from mmaccel.pocket import world
from mmaccel.pocket.train.autoencoder import PIXELS, to_samples
from mmaccel.pocket.train.common import Recipe, Stage
from mmaccel.pocket.train.diffusion import Averaged, to_latents

NEEDED = ("pocket-flow",)
TARGET = Recipe(seed=31, steps=2000, rate=1e-3)
DRAFT = Recipe(seed=32, steps=1500, rate=2e-3)
BATCH, REPEATS, UNLABELLED = 16, 2, 0.1
POOLED, OWN, CHOSEN, TINY = 300, 24, 96, 1e-6
LABELS = [(shape, colour) for shape in world.SHAPES for colour in world.COLOURS]
NAMES = {number: f"{colour} {shape}" for number, (shape, colour) in enumerate(LABELS)}
COMMON = {
    "attention": "causal",
    "grid": 8,
    "channels": 4,
    "latent_scale": 1.0,
    "classes": len(LABELS),
    "prediction": "velocity",
    "variance": "fixed-large",
    "noise_schedule": "log-snr",
    "diffusion_steps": 20,
    "noisy_end": True,
}


def make_target() -> MARModel:
    """9.6 M parameters."""
    return MARModel(
        MARConfig(**COMMON, hidden_size=288, encoder_layers=6, attention_heads=6, head_width=384, head_layers=4)
    )


def make_draft() -> MARModel:
    """0.67 M parameters: a head alone, over the target's backbone."""
    shape = {**COMMON, "attention": "shared"}
    return MARModel(MARConfig(**shape, hidden_size=288, attention_heads=6, head_width=256, head_layers=1))


def distillation_loss(
    draft: MARModel,
    target: MARModel,
    tokens: Tensor,
    labels: Tensor,
    chosen: Tensor,
    draws: Randomness,
    guidance: float = 1.0,
) -> Tensor:
    """What share of the draft's tokens would be rejected, at most, where both read these tokens.  Causal models.

    A trajectory of the draft is rejected with probability 2 Phi(sqrt(S) / 2) - 1 < sqrt(S / 2 pi), where S sums, over
    its steps, the squared distances of draft and target in units of the step's standard deviation (exactly so if they
    do not depend on the state).  The states are those of the target's own walks.
    tokens: [pictures, tokens, size], best of the target's own pictures.  chosen: which of all these tokens, flat, are
    learnt from.  draws: for the chosen ones.
    """
    if not (isinstance(draft.head, DiffusionHead) and isinstance(target.head, DiffusionHead)):
        raise ValueError("diffusion heads are distilled; a draft with a mixture head learns from data: draft.loss")
    branches = [labels] if guidance == 1 else [labels, torch.full_like(labels, UNCONDITIONAL)]

    def conditions(model: MARModel) -> Tensor:
        return torch.stack([model(tokens, label).flatten(0, 1)[chosen] for label in branches])

    def chain(head: DiffusionHead, seen: Tensor) -> DiffusionLaw:
        return head.laws(1.0, target.config.diffusion_steps)(seen, torch.full((len(chosen),), guidance))

    with torch.no_grad():
        theirs = conditions(target)
        walked = walk(chain(target.head, theirs), draws)
    laws = reread(chain(draft.head, theirs if draft.backbone is None else conditions(draft)), walked.states)
    apart = ((laws.mean - walked.laws.mean) / walked.laws.std).square().sum((0, -1))
    return (apart.clamp_min(TINY) / (2 * math.pi)).sqrt().mean()


class Run(nn.Module):
    """Both models, and what they need beside them while they learn."""

    def __init__(self, flow: Any) -> None:
        super().__init__()
        torch.manual_seed(TARGET.seed)
        self.target, self.draft = Averaged(make_target()), Averaged(make_draft())
        self.vae = flow.vae.requires_grad_(False)

    def stages(self) -> list[Stage]:
        return [
            Stage("target", TARGET, self.target_losses, [self.target.model]),
            Stage("draft", DRAFT, self.draft_losses, [self.draft.model]),
        ]

    def target_losses(self, step: int) -> dict[str, Tensor]:
        self.target.update(step)
        tokens, labels, generator = self._batch(TARGET.seed, step)
        model: Any = self.target.model
        return {"velocity": model.loss(tokens, labels, generator, REPEATS)}

    def draft_losses(self, step: int) -> dict[str, Tensor]:
        """Every second step is a guided one."""
        self.draft.update(step)
        tokens, labels = self._own(step // POOLED)
        rng = world.train_rng(DRAFT.seed, step)
        some = torch.from_numpy(rng.choice(len(tokens), 4, replace=False))
        strength = float(rng.uniform(1, 3)) if step % 2 else 1.0
        count = CHOSEN // 2 if step % 2 else CHOSEN
        chosen = torch.from_numpy(rng.choice(len(some) * tokens.shape[1], count, replace=False))
        draws = Randomness.of(torch.Generator().manual_seed(int(rng.integers(2**62))), count, tokens)
        draft, target = cast(MARModel, self.draft.model), cast(MARModel, self.target.average)
        loss = distillation_loss(draft, target, tokens[some], labels[some], chosen, draws, strength)
        return {"guided" if step % 2 else "plain": loss}

    @functools.lru_cache(maxsize=1)  # noqa: B019  # of one run, which lives as long as the process
    def _own(self, number: int) -> tuple[Tensor, Tensor]:
        """Pictures that the target draws, half of them guided, and their labels."""
        target, found = cast(MARModel, self.target.average), []
        rng = world.train_rng(DRAFT.seed + 1, number)
        labels = torch.from_numpy(rng.integers(len(LABELS), size=2 * OWN))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        for part, guidance in zip(labels.chunk(2), (1.0, float(rng.uniform(1, 3))), strict=True):
            found.append(target.to_tokens(target.generate(part, OWN, generator=generator, guidance=guidance)))
        return torch.cat(found), labels

    def _batch(self, seed: int, step: int) -> tuple[Tensor, Tensor, torch.Generator]:
        rng = world.train_rng(seed, step)
        scenes = [world.sample_prompt(rng, "one")[1] for _ in range(BATCH)]
        pictures = to_samples([world.render(scene, PIXELS, texture=False) for scene in scenes])
        labels = [
            UNCONDITIONAL if rng.random() < UNLABELLED else LABELS.index((thing.shape, thing.colour))
            for (thing,) in (scene.things for scene in scenes)
        ]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        model: Any = self.target.model
        return model.to_tokens(to_latents(self.vae, pictures)), torch.tensor(labels), generator

    def save(self, folder: Path) -> None:
        models: Any = (self.target.average, self.draft.average)
        for model, place in zip(models, (folder, folder / "draft"), strict=True):
            model.config.id2label = NAMES
            model.half().save_pretrained(place)
            model.float()


def figures(weights: Path, images: int = 48) -> dict[str, float]:
    """How often the judge finds the label's thing alone in a plain picture, and what speculation gives at batch 1."""
    from mmaccel.pocket.train import load

    model, draft = (MARModel.from_pretrained(folder).float().eval() for folder in (weights, weights / "draft"))
    labels = list(range(len(LABELS)))
    generator = torch.Generator().manual_seed(TARGET.seed)
    latents = model.generate(labels, images, generator=generator, guidance=2.0)
    vae = load("pocket-flow", weights).vae
    with torch.no_grad():
        pictures = vae.decode(latents / vae.config.scaling_factor).sample
    drawn = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    wanted = [LABELS[label] for label in labels for _ in range(images // len(labels))]
    right = [
        [(thing.shape, thing.colour) for thing in world.parse(picture).things] == [aim]
        for picture, aim in zip(drawn, wanted, strict=True)
    ]
    with mmaccel.applied(model, ContinuousSpeculation(draft=draft)) as run:
        model.generate([0], generator=generator, guidance=2.0)
    names = ("acceptance", "tokens_a_round", "speed_up", "predicted_speed_up")
    return {"right": sum(right) / images, **{name: float(run.report[name]) for name in names}}
