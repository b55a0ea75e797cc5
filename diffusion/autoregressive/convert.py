"""The published MAR weights as a checkpoint of `MARModel`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.autoregressive.configuration import MARConfig
from diffusion.autoregressive.modeling import MARModel

HEADS = {768: 12, 1024: 16, 1280: 16}
"""Attention heads of the published widths; a state dictionary does not say them."""

_NAMES = {
    r"class_emb\.": "labels.",
    r"fake_latent": "unconditional",
    r"z_proj_ln\.": "backbone.embed_norm.",
    r"z_proj\.": "backbone.embed.",
    r"(encoder|decoder)_pos_embed_learned": r"backbone.\1_positions",
    r"diffusion_pos_embed_learned": "backbone.head_positions",
    r"(encoder|decoder)_blocks\.(\d+)\.": r"backbone.\1.\2.",
    r"(encoder_norm|decoder_norm|decoder_embed|mask_token)": r"backbone.\1",
    r"diffloss\.net\.time_embed\.mlp\.": "head.time.",
    r"diffloss\.net\.cond_embed\.": "head.condition.",
    r"diffloss\.net\.input_proj\.": "head.input.",
    r"diffloss\.net\.res_blocks\.(\d+)\.": r"head.blocks.\1.",
    r"diffloss\.net\.final_layer\.adaLN_modulation\.1\.": "head.final_modulation.",
    r"diffloss\.net\.final_layer\.linear\.": "head.output.",
}
_PARTS = {
    r"\.attn\.qkv\.": ".attention.query_key_value.",
    r"\.attn\.proj\.": ".attention.out.",
    r"\.norm1\.": ".attention_norm.",
    r"\.norm2\.": ".mlp_norm.",
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.2.",
    r"\.in_ln\.": ".norm.",
    r"\.adaLN_modulation\.1\.": ".modulation.",
}


def convert_mar(file: Path, folder: Path, **settings: Any) -> MARModel:
    """Reads a published file (a pickled dictionary, of which only tensors are read) and writes a checkpoint.

    The averaged weights, `model_ema`, are taken if they are there.  settings: see `read_config`.
    Raises FileNotFoundError or ValueError that name the file and what is wrong with it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}; give the .pth file of a published MAR model")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile pickle raises has no common class
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} cannot be read as tensors alone ({first}); nothing in it was run") from None
    if not isinstance(saved, Mapping):
        raise ValueError(f"{file} holds {type(saved).__name__}, not a dictionary of weights")
    weights = saved.get("model_ema", saved.get("model", saved))
    model = from_published(weights, str(file), **settings)
    model.save_pretrained(folder)
    return model


def from_published(weights: Mapping[str, Tensor], source: str = "the weights", **settings: Any) -> MARModel:
    """A model with these weights, under their published names.  Raises ValueError if one is missing or unknown."""
    renamed = {rename(name): value for name, value in weights.items()}
    if unknown := sorted(
        name for name in renamed if not name.startswith(("labels", "unconditional", "backbone", "head"))
    ):
        raise ValueError(f"{source}: {unknown[0]!r} is no weight of MAR; is this the file of another model?")
    needed = ("backbone.embed.weight", "backbone.encoder_positions", "head.input.weight", "head.output.weight")
    if missing := [name for name in needed if name not in renamed]:
        raise ValueError(
            f"{source}: the weights of MAR are not there ({missing[0]}); is this the file of another model?"
        )
    model: MARModel = MARModel(read_config(renamed, **settings)).eval()
    found = model.load_state_dict(renamed, strict=False)
    if wrong := [*found.missing_keys, *found.unexpected_keys]:
        raise ValueError(f"{source}: {len(wrong)} weights do not fit the model, e.g. {wrong[0]}")
    return model


def rename(name: str) -> str:
    """Our name of a published weight; a name of no weight comes back as it is."""
    for pattern, ours in _NAMES.items():
        if re.match(pattern, name):
            name = re.sub(pattern, ours, name, count=1)
            break
    for pattern, ours in _PARTS.items():
        name = re.sub(pattern, ours, name)
    return name


def read_config(weights: Mapping[str, Tensor], **settings: Any) -> MARConfig:
    """The configuration that weights, under our names, have the shapes of.

    settings: what shapes do not say, where it is not as published: attention_heads, patch_size, noise_schedule, ...
    """
    size = weights["backbone.embed.weight"].shape[1]
    hidden, width = weights["backbone.embed.weight"].shape[0], weights["head.input.weight"].shape[0]
    places, tokens = weights["backbone.encoder_positions"].shape[1], weights["backbone.head_positions"].shape[1]
    patch = settings.pop("patch_size", 1)
    if "attention_heads" not in settings and hidden not in HEADS:
        raise ValueError(
            f"the weights do not say how many attention heads width {hidden} has; published widths are "
            f"{', '.join(map(str, HEADS))}. Pass attention_heads="
        )
    return MARConfig(
        **{
            "grid": math.isqrt(tokens),
            "patch_size": patch,
            "channels": size // patch**2,
            "classes": len(weights["labels.weight"]),
            "hidden_size": hidden,
            "encoder_layers": _count(weights, "backbone.encoder"),
            "decoder_layers": _count(weights, "backbone.decoder"),
            "attention_heads": HEADS.get(hidden, 0),
            "mlp_ratio": len(weights["backbone.encoder.0.mlp.0.weight"]) / hidden,
            "buffer_tokens": places - tokens,
            "head_width": width,
            "head_layers": _count(weights, "head.blocks"),
            "variance": "learned" if len(weights["head.output.weight"]) == 2 * size else "fixed-large",
            **settings,
        }
    )


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[prefix.count(".") + 1] for name in weights if name.startswith(f"{prefix}.")})
