"""The families of vision-language models: a row of facts each, and a small function where packing differs.

To add a family, add a row to `FAMILIES` and the name of its model type; if its tokens are packed in a way of their
own, write the function that says where each token comes from by running the family's own packing over indices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from mmaccel.methods import Unsupported
from vision_tokens.layout import Layout

Inputs = Mapping[str, Any]
"""The arguments of one `get_image_features` call, by name."""


@dataclass(frozen=True)
class Family:
    """What differs between families.

    text: the language model's attribute on the multimodal model.  tower: the vision encoder's.
    projector: the module between encoder and language model, if it works token by token on [tiles, cells, channels]:
        methods that resample features then do so before it; None if the features are resampled behind it.
    layouts: for one call, per image, its layout and its part of the encoder's input.
    saliency: turns recorded attention, one [batch, heads, keys] tensor a call of the encoder layer, into
        [heads, cells], the cells of all pictures in the order of the layouts.
    feature_layer: index of the encoder layer whose output the language model reads.
    grouped_positions: whether positions have more than one axis (M-RoPE).
    """

    text: str
    tower: str
    projector: str | None
    layouts: Callable[[nn.Module, Inputs], list[tuple[Layout, Tensor]]]
    saliency: Callable[[nn.Module, Inputs, list[Tensor]], Tensor]
    feature_layer: Callable[[nn.Module, int], int]
    grouped_positions: bool = False


@dataclass(frozen=True)
class Host:
    """A model of a known family, and where its parts are."""

    family: Family
    multimodal: nn.Module
    text: nn.Module
    tower: nn.Module
    image_token: int

    @property
    def attention_modules(self) -> list[nn.Module]:
        """The encoder's attention modules, in the order of the data's way."""
        return [module for module in self.tower.modules() if hasattr(module, "is_causal")]

    @property
    def has_class_token(self) -> bool:
        """Whether the encoder carries a class token in front of its patches."""
        return any(name.endswith(("class_embedding", "cls_token")) for name, _ in self.tower.named_parameters())


def find_host(target: Any) -> Host:
    """The multimodal model inside `target`, wherever PEFT, accelerate or a task head put it.

    Raises `Unsupported` for anything but a model of a known family, and for one that is compiled already.
    """
    if not isinstance(target, nn.Module):
        raise Unsupported(
            f"visual-token methods decorate transformers vision-language models; got {type(target).__name__}. "
            f"Supported model types: {', '.join(sorted(FAMILIES))}"
        )
    if type(target).__name__ == "OptimizedModule":
        raise Unsupported("this model is compiled already, and a compiled forward ignores hooks; "
                          "apply the method first and compile afterwards")  # fmt: skip
    for module in target.modules():
        family = FAMILIES.get(getattr(getattr(module, "config", None), "model_type", ""))
        if family is not None and family.text in module._modules:
            return Host(
                family=family,
                multimodal=module,
                text=module.get_submodule(family.text),
                tower=module.get_submodule(family.tower),
                image_token=int(module.config.image_token_id),  # type: ignore[union-attr, arg-type]
            )
    kind = getattr(getattr(target, "config", None), "model_type", type(target).__name__)
    raise Unsupported(
        f"visual tokens of the family {kind!r} are not supported; supported: {', '.join(sorted(FAMILIES))}. "
        "CONTRIBUTING.md shows how to add a family"
    )


def grid_of(config: Any) -> int:
    """Cells along one side of a square encoder's grid."""
    return int(config.image_size) // int(config.patch_size)


def _raster(partitions: int, height: int, width: int, device: torch.device) -> Layout:
    return Layout(torch.arange(partitions * height * width, device=device), partitions, height, width)


# LLaVA: one picture an image, its patches in raster order


def _llava_layouts(model: nn.Module, inputs: Inputs) -> list[tuple[Layout, Tensor]]:
    side = grid_of(model.config.vision_config)  # type: ignore[union-attr]
    pixels: Tensor = inputs["pixel_values"]
    return [(_raster(1, side, side, pixels.device), own) for own in pixels]


def _square_saliency(model: nn.Module, inputs: Inputs, rows: list[Tensor]) -> Tensor:
    return rearrange(torch.cat(rows), "pictures heads cells -> heads (pictures cells)")


def _llava_feature_layer(model: nn.Module, layers: int) -> int:
    chosen = model.config.vision_feature_layer  # type: ignore[union-attr]
    chosen = int(chosen if isinstance(chosen, int) else chosen[-1])  # type: ignore[index]
    return (chosen if chosen >= 0 else layers + 1 + chosen) - 1  # hidden state k is the output of layer k - 1


# LLaVA-NeXT: the whole image, then tiles on a plane that is un-padded and gets a newline token a row


def _llava_next_layouts(model: nn.Module, inputs: Inputs) -> list[tuple[Layout, Tensor]]:
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
        image_size_to_num_patches,
    )

    config: Any = model.config
    size, side = config.vision_config.image_size, grid_of(config.vision_config)
    pixels: Tensor = inputs["pixel_values"]
    layouts, first = [], 0
    for index, image_size in enumerate(inputs["image_sizes"]):
        partitions = image_size_to_num_patches(image_size, config.image_grid_pinpoints, size)
        cells = torch.arange(partitions * side * side, device=pixels.device).view(partitions, side * side, 1)
        packed, _ = model.pack_image_features(  # type: ignore[operator]
            [cells],
            [image_size],
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_newline=cells.new_tensor([-1]),
        )
        tiles = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, size)
        own = pixels[index][:partitions] if pixels.dim() == 5 else pixels[first : first + partitions]
        layouts.append((Layout(packed[0].squeeze(-1), partitions, side, side, (int(tiles[0]), int(tiles[1]))), own))
        first += partitions
    return layouts


# Qwen2.5-VL: patches in windows inside the encoder, merged in squares, raster order outside


def _qwen_layouts(model: nn.Module, inputs: Inputs) -> list[tuple[Layout, Tensor]]:
    merge = int(model.config.vision_config.spatial_merge_size)  # type: ignore[union-attr, arg-type]
    grids: list[list[int]] = inputs["image_grid_thw"].tolist()
    patches = inputs["pixel_values"].split([frames * height * width for frames, height, width in grids])
    return [
        (_raster(frames, height // merge, width // merge, own.device), own)
        for (frames, height, width), own in zip(grids, patches, strict=True)
    ]


def _qwen_saliency(model: nn.Module, inputs: Inputs, rows: list[Tensor]) -> Tensor:
    """Attention of patches in window order to that of merged tokens in raster order (mean over a token's patches)."""
    from transformers.vision_utils import get_vision_window_index

    vision: Any = model.config.vision_config  # type: ignore[union-attr]
    window_index, _ = get_vision_window_index(
        inputs["image_grid_thw"], vision.spatial_merge_size, vision.window_size, vision.patch_size
    )
    merged = reduce(
        torch.cat(rows, dim=-1).squeeze(0),
        "heads (tokens patches) -> heads tokens",
        "mean",
        patches=vision.spatial_merge_size**2,
    )
    return torch.index_select(merged, 1, window_index.to(merged.device).argsort())


def _qwen_feature_layer(model: nn.Module, layers: int) -> int:
    return int(max(model.config.vision_config.fullatt_block_indexes))  # type: ignore[union-attr, arg-type]


# SmolVLM and Idefics3: every tile is a picture of its own between text tokens, its patches shuffled into fewer tokens


def _idefics_layouts(model: nn.Module, inputs: Inputs) -> list[tuple[Layout, Tensor]]:
    config: Any = model.config
    side = grid_of(config.vision_config) // config.scale_factor
    pixels = inputs["pixel_values"].flatten(0, 1)
    real = (pixels != 0).flatten(1).any(dim=-1)  # the model drops padding pictures, which are all zero,
    real[0] |= ~real.any()  # but leaves one
    return [(_raster(1, side, side, pixels.device), tile) for tile in pixels[real]]


def _idefics_saliency(model: nn.Module, inputs: Inputs, rows: list[Tensor]) -> Tensor:
    """Attention of patches to that of tokens: the mean over the square of patches that is shuffled into one."""
    config: Any = model.config
    factor = int(config.scale_factor)
    return reduce(
        torch.cat(rows),
        "tiles heads (rows a columns b) -> heads (tiles rows columns)",
        "mean",
        rows=grid_of(config.vision_config) // factor,
        a=factor,
        b=factor,
    )


def _last_layer(model: nn.Module, layers: int) -> int:
    return layers - 1


_IDEFICS = Family("text_model", "vision_model", None, _idefics_layouts, _idefics_saliency, _last_layer)

FAMILIES: dict[str, Family] = {
    "llava": Family(
        "language_model", "vision_tower", "multi_modal_projector",
        _llava_layouts, _square_saliency, _llava_feature_layer,
    ),
    "llava_next": Family(
        "language_model", "vision_tower", "multi_modal_projector",
        _llava_next_layouts, _square_saliency, _llava_feature_layer,
    ),
    "qwen2_5_vl": Family(
        "language_model", "visual", None,
        _qwen_layouts, _qwen_saliency, _qwen_feature_layer, grouped_positions=True,
    ),
    "smolvlm": _IDEFICS,
    "idefics3": _IDEFICS,
}  # fmt: skip
"""By `config.model_type`."""
