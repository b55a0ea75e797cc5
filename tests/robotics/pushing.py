"""A tiny random policy of pocket-vla's kind, on the tabletop."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from mmaccel.pocket.train.common import initialise, make_tokenizer
from robotics.action_tokens import ActionTokenPolicy
from robotics.pocket import load
from robotics.training import Run


def make_llava() -> Any:
    """What pocket-llava is, only smaller and random."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    tokenizer = make_tokenizer(end=False)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", **small, "num_hidden_layers": 3, "image_size": 96, "patch_size": 8
        },
        text_config={
            "model_type": "llama", **small, **special, "num_hidden_layers": 4, "vocab_size": len(tokenizer),
            "tie_word_embeddings": True,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=144,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    initialise(model, 0.2)
    model.tie_weights()
    return model.eval()


def save_policy(folder: Path) -> Path:
    Run(make_llava()).save(folder)
    return folder


def make_policy(folder: Path) -> ActionTokenPolicy:
    return load(save_policy(folder))
