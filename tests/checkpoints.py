"""Checkpoint folders of tiny random models with the pocket models' processors, for what starts from a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration

from mmaccel.pocket.train import llava, llava_next

TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 96,
    "patch_size": 8,
}
NARROW = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_llava(folder: Path) -> Path:
    """A `LlavaForConditionalGeneration` of 144 visual tokens."""
    return _save(LlavaForConditionalGeneration, LlavaConfig, llava.make_processor(), folder, image_seq_length=144)


def save_llava_next(folder: Path) -> Path:
    """A `LlavaNextForConditionalGeneration` with tiles of 96 px."""
    pinpoints = llava_next.PINPOINTS
    processor = llava_next.make_processor()
    return _save(LlavaNextForConditionalGeneration, LlavaNextConfig, processor, folder, image_grid_pinpoints=pinpoints)


def _save(model_class: Any, config_class: Any, processor: Any, folder: Path, **facts: Any) -> Path:
    torch.manual_seed(0)
    config = config_class(
        vision_config=TOWER,
        text_config={**llava.language_config(), **NARROW},
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **facts,
    )
    model_class(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
