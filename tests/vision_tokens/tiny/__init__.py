"""Tiny random models of the real classes, and prompts for them: no download, a few milliseconds a forward."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from tests.vision_tokens.tiny import llava, pooled, qwen, squares
from tests.vision_tokens.tiny.prompts import IMAGE, PAD, PINPOINTS, TEXT, TOWER, VIDEO, Prompts, picture

__all__ = ["FAMILIES", "IMAGE", "PINPOINTS", "TEXT", "TOWER", "VIDEO", "VIDEO_FAMILIES", "Prompts", "build",
           "inputs_for", "picture", "token_types"]  # fmt: skip

_BUILDERS = {**llava.BUILDERS, **qwen.BUILDERS, **squares.BUILDERS, **pooled.BUILDERS}
_IMAGES = {**llava.IMAGES, **qwen.IMAGES, **squares.IMAGES, **pooled.IMAGES}
_VIDEOS = {**llava.VIDEOS, **qwen.VIDEOS, **pooled.VIDEOS}
FAMILIES = sorted(_BUILDERS)
VIDEO_FAMILIES = sorted(_VIDEOS)


@cache
def build(family: str, attention: str = "sdpa", seed: int = 0) -> nn.Module:
    """A model of the family with seeded random weights; made once, since every test gives it back as it was."""
    torch.manual_seed(seed)
    model = _BUILDERS[family](attention)
    model.generation_config.eos_token_id = None  # random weights would stop anywhere,
    with torch.no_grad():
        model.get_output_embeddings().weight[[IMAGE, VIDEO]] *= 0.01  # and answer with placeholders
    return model.eval()


def inputs_for(family: str, prompts: Prompts, model: nn.Module) -> dict[str, Any]:
    """The arguments of a forward or of `generate`, as the family's processor would give them."""
    images, inputs = _IMAGES[family](prompts, model) if prompts.flat else ([[] for _ in prompts.images], {})
    videos, more = _VIDEOS[family](prompts, model) if prompts.videos else ([[] for _ in prompts.images], {})
    rows, seen = [], model.config.video_token_id if prompts.videos else VIDEO
    for row in range(len(prompts.text)):
        words = prompts.words(row)
        groups = [(IMAGE, count) for count in images[row]] + [(seen, count) for count in videos[row]]
        places = [token for kind, count in groups for token in [5, *[kind] * count, 6]]
        rows.append([*words[:2], *places, *words[2:]])
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, words in enumerate(rows):
        place = slice(longest - len(words), None) if prompts.side == "left" else slice(0, len(words))
        ids[row, place], mask[row, place] = torch.tensor(words), 1
    return {"input_ids": ids, "attention_mask": mask, **inputs, **more, **token_types(family, ids)}


def token_types(family: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the family's processor says of each token's type."""
    if family in qwen.BUILDERS:
        return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
    if family == "molmo2":
        return {"mm_token_type_ids": (ids == IMAGE).int()}
    if family == "gemma3":
        return {"token_type_ids": (ids == IMAGE).long()}
    if family.startswith("paligemma"):
        return {"token_type_ids": torch.zeros_like(ids)}
    return {}
