"""Tiny random models of the real classes, and prompts for them: no download, a few milliseconds a forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

IMAGE, VIDEO, PAD, VOCABULARY = 99, 98, 0, 100
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 48,
    "patch_size": 8,
    "initializer_range": 0.2,
}
PINPOINTS = [[48, 96], [96, 48], [96, 96], [48, 144], [144, 48]]


@dataclass
class Prompts:
    """Rows of a prompt: per row its image sizes (height, width in pixels) and its number of text tokens."""

    images: Sequence[Sequence[tuple[int, int]]] = ((((96, 70)),),)
    text: Sequence[int] = (7,)
    side: str = "left"
    seed: int = 0


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
    pixels, tokens, extra = _PREPARERS[family](prompts, model)
    generator = torch.Generator().manual_seed(1000 + prompts.seed)
    rows = []
    for row, length in enumerate(prompts.text):
        words = torch.randint(3, 90, (length,), generator=generator).tolist()
        places = [token for count in tokens[row] for token in [5, *[IMAGE] * count, 6]]
        rows.append([*words[:2], *places, *words[2:]])
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, words in enumerate(rows):
        place = slice(longest - len(words), None) if prompts.side == "left" else slice(0, len(words))
        ids[row, place], mask[row, place] = torch.tensor(words), 1
    inputs = {"input_ids": ids, "attention_mask": mask, **extra}
    if pixels is not None:
        inputs["pixel_values"] = pixels
    if family == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs


def picture(row: int, number: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random pixels that depend on the picture's place in the prompts alone."""
    generator = torch.Generator().manual_seed(7 + 31 * row + 1009 * number + 100003 * seed)
    return torch.randn(shape, generator=generator)


def _flat(prompts: Prompts) -> list[tuple[int, int, tuple[int, int]]]:
    return [(row, number, size) for row, sizes in enumerate(prompts.images) for number, size in enumerate(sizes)]


def _llava(attention: str, tower: str = "clip_vision_model", windows: bool = False) -> nn.Module:
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


def _llava_inputs(prompts: Prompts, model: nn.Module) -> tuple[Tensor | None, list[list[int]], dict[str, Any]]:
    pixels = [picture(row, number, (3, 48, 48), prompts.seed) for row, number, _ in _flat(prompts)]
    return torch.stack(pixels) if pixels else None, [[36] * len(sizes) for sizes in prompts.images], {}


def _llava_next(attention: str) -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        attn_implementation=attention,
    )
    return LlavaNextForConditionalGeneration(config)


def _llava_next_inputs(prompts: Prompts, model: nn.Module) -> tuple[Tensor | None, list[list[int]], dict[str, Any]]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    flat = _flat(prompts)
    if not flat:
        return None, [[] for _ in prompts.images], {}
    tiles = [image_size_to_num_patches(list(size), PINPOINTS, 48) for *_, size in flat]
    pixels = torch.zeros(len(flat), max(tiles), 3, 48, 48)
    for index, (row, number, _) in enumerate(flat):
        pixels[index, : tiles[index]] = picture(row, number, (tiles[index], 3, 48, 48), prompts.seed)
    sizes = torch.tensor([size for *_, size in flat])
    features = [torch.zeros(count, 36, 32) for count in tiles]
    _, lengths = model.pack_image_features(features, sizes, "default", image_newline=torch.zeros(32))
    counts = iter(lengths.tolist())
    return pixels, [[next(counts) for _ in sizes] for sizes in prompts.images], {"image_sizes": sizes}


def _qwen(attention: str) -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 4, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32,
        "patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1, 3], "initializer_range": 0.2,
    }  # fmt: skip
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
        attn_implementation=attention,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen_inputs(prompts: Prompts, model: nn.Module) -> tuple[Tensor | None, list[list[int]], dict[str, Any]]:
    flat = _flat(prompts)
    if not flat:
        return None, [[] for _ in prompts.images], {}
    grids = [(1, size[0] // 16 * 2, size[1] // 16 * 2) for *_, size in flat]
    pixels = [
        picture(row, number, (grid[1] * grid[2], 3 * 2 * 8 * 8), prompts.seed)
        for (row, number, _), grid in zip(flat, grids, strict=True)
    ]
    counts = [[(size[0] // 16) * (size[1] // 16) for size in sizes] for sizes in prompts.images]
    return torch.cat(pixels), counts, {"image_grid_thw": torch.tensor(grids)}


def _idefics(attention: str, smol: bool) -> nn.Module:
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


def _idefics_inputs(prompts: Prompts, model: nn.Module) -> tuple[Tensor | None, list[list[int]], dict[str, Any]]:
    flat = _flat(prompts)
    if not flat:
        return None, [[] for _ in prompts.images], {}
    most = max(map(len, prompts.images))
    pixels = torch.zeros(len(prompts.images), most, 3, 48, 48)
    for row, number, _ in flat:
        pixels[row, number] = picture(row, number, (3, 48, 48), prompts.seed)
    return pixels, [[9] * len(sizes) for sizes in prompts.images], {}


_BUILDERS = {
    "llava": _llava,
    "llava-siglip": lambda attention: _llava(attention, "siglip_vision_model"),
    "llava-mistral": lambda attention: _llava(attention, windows=True),
    "llava_next": _llava_next,
    "qwen2_5_vl": _qwen,
    "smolvlm": lambda attention: _idefics(attention, smol=True),
    "idefics3": lambda attention: _idefics(attention, smol=False),
}
_PREPARERS = {
    "llava": _llava_inputs,
    "llava-siglip": _llava_inputs,
    "llava-mistral": _llava_inputs,
    "llava_next": _llava_next_inputs,
    "qwen2_5_vl": _qwen_inputs,
    "smolvlm": _idefics_inputs,
    "idefics3": _idefics_inputs,
}
FAMILIES = sorted(_BUILDERS)
