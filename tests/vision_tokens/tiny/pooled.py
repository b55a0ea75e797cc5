"""A tiny Molmo 2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.vision_tokens.tiny.llava import Prepared
from tests.vision_tokens.tiny.prompts import IMAGE, TEXT, Prompts


def molmo2(attention: str) -> nn.Module:
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration

    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "hidden_size": 32}
    wide = {"intermediate_size": 64, "initializer_range": 0.2}
    config = Molmo2Config(
        vision_config={**heads, **wide, "num_hidden_layers": 3, "image_size": [48, 48], "patch_size": 8},
        adapter_config={**heads, **wide, "vision_feature_layer": [-1, -2], "text_hidden_size": 32},
        text_config={**TEXT, "head_dim": 8, "additional_vocab_size": 0},
        image_patch_id=IMAGE,
        attn_implementation=attention,
    )
    return Molmo2ForConditionalGeneration(config)


def pooled(crop: int, height: int, width: int) -> Tensor:
    """Squares of four of a crop's 6 x 6 patches: [height * width, 4]; the last square lacks one of its patches."""
    patches = torch.arange(36).view(3, 2, 3, 2).permute(0, 2, 1, 3).reshape(3, 3, 4)[:height, :width].reshape(-1, 4)
    patches = patches + 36 * crop
    patches[-1, -1] = -1
    return patches


def images(prompts: Prompts, model: nn.Module) -> Prepared:
    """A crop of the whole image with 3 x 3 tokens, and one of a part with 3 x 2."""
    pixels, pooling = [], []
    for index, (row, number, _) in enumerate(prompts.flat):
        pixels.append(prompts.picture(row, number, (2, 36, 8 * 8 * 3)))
        pooling += [pooled(2 * index, 3, 3), pooled(2 * index + 1, 3, 2)]
    inputs = {
        "pixel_values": torch.cat(pixels),
        "image_token_pooling": torch.cat(pooling),
        "image_grids": torch.tensor([[3, 3, 3, 2]] * len(prompts.flat)),
    }
    return [[15] * len(sizes) for sizes in prompts.images], inputs


def videos(prompts: Prompts, model: nn.Module) -> Prepared:
    """Frames with 3 x 3 tokens each."""
    videos = [prompts.picture(row, 100 + number, (frames, 36, 192)) for row, number, frames in prompts.flat_videos]
    inputs = {
        "pixel_values_videos": torch.cat(videos),
        "video_token_pooling": torch.cat([pooled(frame, 3, 3) for frame in range(sum(map(len, videos)))]),
        "video_grids": torch.tensor([[frames, 3, 3] for *_, frames in prompts.flat_videos]),
    }
    return [[9] * sum(row) for row in prompts.videos], inputs


BUILDERS = {"molmo2": molmo2}
IMAGES = {"molmo2": images}
VIDEOS = {"molmo2": videos}
