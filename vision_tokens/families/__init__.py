"""The families of vision-language models: a row of facts each, and small functions where packing differs.

To add a family, add a row to `FAMILIES` under its model type; if its tokens are packed in a way of their own, write the
function that says where each token comes from, in the file of its kin, by running the family's own packing over
indices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mmaccel.methods import Unsupported
from vision_tokens.families import llava, pooled, qwen, shuffled
from vision_tokens.families.facts import Family, Packing, last_layer

_IDEFICS = Family(
    "text_model", "vision_model", last_layer, Packing(shuffled.idefics_layouts, shuffled.idefics_saliency)
)
_PROJECTOR = "multi_modal_projector"

_TILES = Packing(llava.tiled_layouts, llava.square_saliency, _PROJECTOR)
_PICTURES = Packing(llava.square_layouts, llava.square_saliency, _PROJECTOR)

FAMILIES: dict[str, Family] = {
    "llava": Family("language_model", "vision_tower", llava.feature_layer, _PICTURES),
    "llava_next": Family("language_model", "vision_tower", llava.feature_layer, _TILES),
    "llava_next_video": Family(
        "language_model", "vision_tower", llava.feature_layer, _TILES,
        Packing(llava.pooled_frames_layouts, llava.pooled_frames_saliency, _PROJECTOR),
    ),
    "llava_onevision": Family(
        "language_model", "vision_tower", llava.feature_layer,
        Packing(llava.blended_layouts, llava.square_saliency, _PROJECTOR),
        Packing(llava.halved_frames_layouts, llava.halved_frames_saliency),
    ),
    "fast_vlm": Family(
        "language_model", "vision_tower", last_layer,
        Packing(llava.sequence_layouts, llava.square_saliency, _PROJECTOR),
    ),
    "qwen2_vl": Family(
        "language_model", "visual", last_layer,
        qwen.packing("image"), qwen.packing("video"), grouped_positions=True,
    ),
    "qwen2_5_vl": Family(
        "language_model", "visual", qwen.last_full_layer,
        qwen.packing("image", windows=True), qwen.packing("video", windows=True), grouped_positions=True,
    ),
    "qwen3_vl": Family(
        "language_model", "visual", last_layer,
        qwen.packing("image"), qwen.packing("video"), grouped_positions=True,
    ),
    "smolvlm": _IDEFICS,
    "idefics3": _IDEFICS,
    "internvl": Family(
        "language_model", "vision_tower", llava.feature_layer,
        Packing(shuffled.internvl_layouts, shuffled.internvl_saliency, _PROJECTOR),
    ),
    "gemma3": Family(
        "language_model", "vision_tower", last_layer,
        Packing(shuffled.gemma_layouts, shuffled.gemma_saliency),
    ),
    "paligemma": Family("language_model", "vision_tower", last_layer, _PICTURES),
    "molmo2": Family(
        "language_model", "vision_tower", pooled.feature_layer, pooled.packing("image"), pooled.packing("video"),
    ),
    "mistral3": Family(
        "language_model", "vision_tower", llava.feature_layer,
        Packing(shuffled.mistral_layouts, shuffled.mistral_saliency),
    ),
}  # fmt: skip
"""By `config.model_type`."""


@dataclass(frozen=True)
class Host:
    """A model of a known family, and where its parts are.

    tokens: by kind of input ("image", "video"), the placeholder token in a prompt.
    """

    family: Family
    multimodal: nn.Module
    text: nn.Module
    tower: nn.Module
    tokens: dict[str, int]

    @property
    def attention_modules(self) -> list[nn.Module]:
        """The encoder's attention modules, in the order of the data's way."""
        return [module for module in self.tower.modules() if hasattr(module, "is_causal")]

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """The language model's layers, in the order of the data's way."""
        return list(self.text.layers)  # type: ignore[arg-type]

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
        config: Any = getattr(module, "config", None)
        family = FAMILIES.get(getattr(config, "model_type", ""))
        if family is not None and family.text in module._modules:
            return Host(
                family=family,
                multimodal=module,
                text=module.get_submodule(family.text),
                tower=module.get_submodule(family.tower),
                tokens={kind: int(getattr(config, f"{kind}_token_id")) for kind in family.packings},
            )
    kind = getattr(getattr(target, "config", None), "model_type", type(target).__name__)
    raise Unsupported(
        f"visual tokens of the family {kind!r} are not supported; supported: {', '.join(sorted(FAMILIES))}. "
        "CONTRIBUTING.md shows how to add a family"
    )
