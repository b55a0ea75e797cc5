"""What the drawing pocket models reach: the judge's verdict on pictures for held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmaccel.pocket import motion, world
from mmaccel.pocket.train.autoencoder import PIXELS, to_samples

BATCH = 50


def draw(pipeline: Any, prompts: Sequence[str], seed: int = 0, **call: Any) -> list[world.Image]:
    """One picture for each prompt, drawn by the pipeline's own call; the noise of each follows from seed and place."""
    drawn: list[world.Image] = []
    for start in range(0, len(prompts), BATCH):
        part = list(prompts[start : start + BATCH])
        generators = [torch.Generator().manual_seed(10_000 * seed + start + number) for number in range(len(part))]
        images = pipeline(part, generator=generators, output_type="np", **call).images
        drawn += list(to_picture(images))
    return drawn


def to_picture(samples: np.ndarray) -> world.Image:
    """Pictures from numbers in [0, 1]."""
    return np.asarray((samples * 255).round().astype(np.uint8))


def success(pipeline: Any, count: int = 200, seed: int = 0, **call: Any) -> dict[str, float]:
    """The share of held-out prompts whose first picture satisfies them: for each kind of prompt, and for all."""
    prompts = world.prompts(count, seed)
    scenes = [world.parse(image) for image in draw(pipeline, prompts, seed, **call)]
    right = np.array([world.satisfies(*pair) for pair in zip(prompts, scenes, strict=True)])
    kinds = world.PROMPTS[1:]
    shares = {kind: float(right[place :: len(kinds)].mean()) for place, kind in enumerate(kinds)}
    graded = float(np.mean([world.score(*pair) for pair in zip(prompts, scenes, strict=True)]))
    return {**shares, "all": float(right.mean()), "score": graded}


def success_in_motion(pipeline: Any, count: int = 50, seed: int = 0, **call: Any) -> dict[str, float]:
    """As `success`, of clips: for prompts of one and of two things, and for all."""
    prompts = motion.prompts(count, seed)
    clips = [
        (pipeline(prompt, generator=torch.Generator().manual_seed(10_000 * seed + number), output_type="np", **call))
        for number, prompt in enumerate(prompts)
    ]
    pairs = [(prompt, to_picture(clip.frames[0])) for prompt, clip in zip(prompts, clips, strict=True)]
    right = np.array([motion.satisfies_motion(*pair) for pair in pairs])
    graded = float(np.mean([motion.score_motion(*pair) for pair in pairs]))
    shares = {"one": float(right[::2].mean()), "two": float(right[1::2].mean())}
    return {**shares, "all": float(right.mean()), "score": graded}


def round_trip(vae: Any, count: int = 400) -> float:
    """The share of held-out scenes in which the parser finds the same things after encoding and decoding."""
    rng = np.random.default_rng(world.HELD_OUT_SEEDS[2])
    scenes = [world.sample_scene(rng, (1, 4), world.DRAWN) for _ in range(count)]
    pictures = to_samples([world.render(scene, PIXELS, texture=False) for scene in scenes])
    with torch.inference_mode():
        decoded = vae.decode(vae.encode(pictures).latent_dist.mean).sample
    images = to_picture(decoded.clamp(-1, 1).permute(0, 2, 3, 1).numpy() / 2 + 0.5)
    same = [
        sorted(thing.name for thing in scene.things) == sorted(thing.name for thing in world.parse(image).things)
        for scene, image in zip(scenes, images, strict=True)
    ]
    return float(np.mean(same))


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"guidance_scale": 1.0},
    {"guidance_scale": 4.0},
    {"guidance_scale": 7.0},
    {"num_inference_steps": 10},
)


def of(name: str, weights: Path, count: int = 200) -> dict[str, dict[str, float]]:
    """All figures of a pocket pipeline, loaded from this folder: success with the defaults of its call, and others."""
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(weights)
    pipeline.set_progress_bar_config(disable=True)
    defaults = json.loads((weights / "call.json").read_text())
    found = {"autoencoder": {"round trip": round_trip(pipeline.vae)}}
    for change in SETTINGS:
        title = ", ".join(f"{key} {value}" for key, value in change.items()) or "defaults"
        measure = success_in_motion if name == "pocket-video" else success
        found[title] = measure(pipeline, count // 4 if name == "pocket-video" else count, **{**defaults, **change})
    return found
