"""Tiny models of LLaVA's kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tests.vision_tokens.tiny.prompts import IMAGE, PINPOINTS, TEXT, TOWER, VIDEO, Prompts

Prepared = tuple[list[list[int]], dict[str, Any]]
"""Per row, the number of tokens of each of its images or videos; and the arguments that bring them."""


def llava(attention: str, tower: str = "clip_vision_model", windows: bool = False) -> nn.Module:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        MistralConfig,
        SiglipVisionConfig,
    )

    clip = tower == "clip_vision_model"
    vision = CLIPVisionConfig(**TOWER) if clip else SiglipVisionConfig(**TOWER)
    config = LlavaConfig(
        vision_config=vision,
        text_config=MistralConfig(**TEXT, sliding_window=16) if windows else LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if clip else "full",
        attn_implementation=attention,
    )
    return LlavaForConditionalGeneration(config)


def llava_next(attention: str) -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        attn_implementation=attention,
    )
    return LlavaNextForConditionalGeneration(config)


def llava_next_video(attention: str) -> nn.Module:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
    )

    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        attn_implementation=attention,
    )
    return LlavaNextVideoForConditionalGeneration(config)


def llava_onevision(attention: str, aspect: str = "anyres_max_9") -> nn.Module:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=aspect,
        attn_implementation=attention,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def fast_vlm(attention: str) -> nn.Module:
    """The published encoder is timm's FastViTHD; this is another convolutional one, which transformers has itself."""
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration, Qwen2Config, ResNetConfig

    config = FastVlmConfig(
        vision_config=ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", hidden_size=32
        ),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=36,
        attn_implementation={"": attention, "vision_config": "eager"},  # it has no attention
    )
    return FastVlmForConditionalGeneration(config)


def squares_of(tokens: int) -> Any:
    """Prepares square pictures of so many tokens each."""

    def prepare(prompts: Prompts, model: nn.Module) -> Prepared:
        pixels = [prompts.picture(row, number, (3, 48, 48)) for row, number, _ in prompts.flat]
        return [[tokens] * len(sizes) for sizes in prompts.images], {"pixel_values": torch.stack(pixels)}

    return prepare


def tiles(prompts: Prompts, model: nn.Module) -> Prepared:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    counts = [image_size_to_num_patches(list(size), PINPOINTS, 48) for *_, size in prompts.flat]
    sizes = torch.tensor([size for *_, size in prompts.flat])
    features = [torch.zeros(count, 36, 32) for count in counts]
    _, lengths = model.pack_image_features(features, sizes, "default", image_newline=torch.zeros(32))
    return _grouped(lengths.tolist(), prompts.images), _tiled(prompts, counts) | {"image_sizes": sizes}


def tiles_or_wholes(prompts: Prompts, model: nn.Module) -> Prepared:
    """One image in a row is cut into tiles, several are not."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    together = [len(sizes) for sizes in prompts.images if sizes]
    counts = [
        image_size_to_num_patches(list(size), PINPOINTS, 48) if len(prompts.images[row]) == 1 else 1
        for row, _, size in prompts.flat
    ]
    sizes = torch.tensor([size for *_, size in prompts.flat])
    aspect = model.config.vision_aspect_ratio
    features = [torch.zeros(count, 36, 32) for count in counts]
    _, lengths = model.model.pack_image_features(features, sizes, torch.zeros(32), aspect)
    extra = {"image_sizes": sizes, "batch_num_images": torch.tensor(together)}
    return _grouped(lengths.tolist(), prompts.images), _tiled(prompts, counts) | extra


def _tiled(prompts: Prompts, counts: Sequence[int]) -> dict[str, Any]:
    pixels = torch.zeros(len(counts), max(counts), 3, 48, 48)
    for index, (row, number, _) in enumerate(prompts.flat):
        pixels[index, : counts[index]] = prompts.picture(row, number, (counts[index], 3, 48, 48))
    return {"pixel_values": pixels}


def _grouped(flat: Sequence[int], like: Sequence[Sequence[Any]]) -> list[list[int]]:
    left = iter(flat)
    return [[next(left) for _ in row] for row in like]


def frames_of(tokens: int, newlines: int) -> Any:
    """Prepares videos of so many tokens a frame, and so many newline tokens behind the last."""

    def prepare(prompts: Prompts, model: nn.Module) -> Prepared:
        videos = [
            prompts.picture(row, 100 + number, (frames, 3, 48, 48)) for row, number, frames in prompts.flat_videos
        ]
        counts = [[frames * tokens + newlines for frames in row] for row in prompts.videos]
        return counts, {"pixel_values_videos": torch.stack(videos)}

    return prepare


BUILDERS = {
    "llava": llava,
    "llava-siglip": lambda attention: llava(attention, "siglip_vision_model"),
    "llava-mistral": lambda attention: llava(attention, windows=True),
    "llava_next": llava_next,
    "llava_next_video": llava_next_video,
    "llava_onevision": llava_onevision,
    "fast_vlm": fast_vlm,
}
IMAGES = {
    "llava": squares_of(36),
    "llava-siglip": squares_of(36),
    "llava-mistral": squares_of(36),
    "llava_next": tiles,
    "llava_next_video": tiles,
    "llava_onevision": tiles_or_wholes,
    "fast_vlm": squares_of(36),
}
VIDEOS = {"llava_next_video": frames_of(9, 0), "llava_onevision": frames_of(9, 1)}
