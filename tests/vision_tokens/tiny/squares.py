"""Tiny models of families that make one token of a square of patches, and of PaliGemma."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.vision_tokens.tiny.llava import Prepared, squares_of
from tests.vision_tokens.tiny.prompts import IMAGE, PAD, TEXT, TOWER, Prompts

WINDOW = 16
"""Places that Gemma's windows look back: fewer than any prompt with an image has."""


def idefics(attention: str, smol: bool) -> nn.Module:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        LlamaConfig,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
    )

    settings: dict[str, Any] = {
        "vision_config": TOWER,
        "text_config": LlamaConfig(**TEXT),
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "pad_token_id": PAD,
        "attn_implementation": attention,
    }
    if smol:
        return SmolVLMForConditionalGeneration(SmolVLMConfig(**settings))
    return Idefics3ForConditionalGeneration(Idefics3Config(**settings))


def idefics_images(prompts: Prompts, model: nn.Module) -> Prepared:
    pixels = torch.zeros(len(prompts.images), max(map(len, prompts.images)), 3, 48, 48)
    for row, number, _ in prompts.flat:
        pixels[row, number] = prompts.picture(row, number, (3, 48, 48))
    return [[9] * len(sizes) for sizes in prompts.images], {"pixel_values": pixels}


def internvl(attention: str) -> nn.Module:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**{**TOWER, "image_size": [48, 48], "patch_size": [8, 8]}),
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=9,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    return InternVLForConditionalGeneration(config)


def gemma3(attention: str) -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(
        **TEXT,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * (TEXT["num_hidden_layers"] // 2),
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=text,
        image_token_index=IMAGE,
        mm_tokens_per_image=9,
        attn_implementation=attention,
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # born as zeros
    return model


def paligemma(attention: str, second: bool = False) -> nn.Module:
    from transformers import (
        Gemma2Config,
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        SiglipVisionConfig,
    )

    windows = {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": None}
    text = Gemma2Config(**TEXT, head_dim=8, **windows) if second else GemmaConfig(**TEXT, head_dim=8)
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False, projection_dim=32),
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        attn_implementation={"": attention, "text_config": "eager"} if second else attention,
    )
    return PaliGemmaForConditionalGeneration(config)


def mistral3(attention: str) -> nn.Module:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**{**TOWER, "image_size": 160}),
        text_config=MistralConfig(**TEXT, sliding_window=None),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    return Mistral3ForConditionalGeneration(config)


def mistral3_images(prompts: Prompts, model: nn.Module) -> Prepared:
    sizes = [(height // 8 * 8, width // 8 * 8) for *_, (height, width) in prompts.flat]
    tallest, widest = (max(side) for side in zip(*sizes, strict=True))
    pixels = torch.zeros(len(sizes), 3, tallest, widest)
    for index, ((row, number, _), (height, width)) in enumerate(zip(prompts.flat, sizes, strict=True)):
        pixels[index, :, :height, :width] = prompts.picture(row, number, (3, height, width))
    counts = [[(height // 16) * (width // 16) for height, width in row] for row in prompts.images]
    return counts, {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


BUILDERS = {
    "smolvlm": lambda attention: idefics(attention, smol=True),
    "idefics3": lambda attention: idefics(attention, smol=False),
    "internvl": internvl,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "paligemma-2": lambda attention: paligemma(attention, second=True),
    "mistral3": mistral3,
}
IMAGES = {
    "smolvlm": idefics_images,
    "idefics3": idefics_images,
    "internvl": squares_of(9),
    "gemma3": squares_of(9),
    "paligemma": squares_of(36),
    "paligemma-2": squares_of(36),
    "mistral3": mistral3_images,
}
