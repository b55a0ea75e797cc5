"""Tiny models of Qwen-VL's kin."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.vision_tokens.tiny.llava import Prepared
from tests.vision_tokens.tiny.prompts import IMAGE, TEXT, VIDEO, Prompts

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def qwen2_vl(attention: str) -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {
        "depth": 3, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 8,
        "initializer_range": 0.2,
    }  # fmt: skip
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(**_settings(vision, attention)))


def qwen2_5_vl(attention: str) -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 4, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32,
        "patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1, 3], "initializer_range": 0.2,
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**_settings(vision, attention)))


def qwen3_vl(attention: str) -> nn.Module:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {
        "depth": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32,
        "patch_size": 8, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1], "initializer_range": 0.2,
    }  # fmt: skip
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**_settings(vision, attention, head_dim=8)))


def _settings(vision: dict[str, Any], attention: str, **text: Any) -> dict[str, Any]:
    return {
        "vision_config": vision,
        "text_config": {**TEXT, "rope_parameters": dict(ROPE), **text},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "attn_implementation": attention,
    }


def images(prompts: Prompts, model: nn.Module) -> Prepared:
    grids = [(1, size[0] // 16 * 2, size[1] // 16 * 2) for *_, size in prompts.flat]
    pixels = [
        prompts.picture(row, number, (grid[1] * grid[2], 3 * 2 * 8 * 8))
        for (row, number, _), grid in zip(prompts.flat, grids, strict=True)
    ]
    counts = [[(size[0] // 16) * (size[1] // 16) for size in sizes] for sizes in prompts.images]
    return counts, {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}


def videos(prompts: Prompts, model: nn.Module) -> Prepared:
    """Videos of 48 x 64 pixels; two frames are one in the encoder, and Qwen3-VL puts text between them."""
    grids = [(frames // 2, 6, 8) for *_, frames in prompts.flat_videos]
    pixels = [
        prompts.picture(row, 100 + number, (frames // 2 * 48, 3 * 2 * 8 * 8))
        for row, number, frames in prompts.flat_videos
    ]
    apart = model.config.model_type == "qwen3_vl"
    counts = [
        [count for frames in row for count in ([12] * (frames // 2) if apart else [frames // 2 * 12])]
        for row in prompts.videos
    ]
    return counts, {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.tensor(grids)}


BUILDERS = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}
IMAGES = dict.fromkeys(BUILDERS, images)
VIDEOS = dict.fromkeys(BUILDERS, videos)
