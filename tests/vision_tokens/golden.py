"""Inputs and outputs of the official implementations, as they lie in tests/golden."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tests.vision_tokens.tiny import TOWER
from vision_tokens.prompts import set_visual_places

FOLDER = Path(__file__).parents[1] / "golden"


def load(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one golden file, and the exact numbers in its metadata."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def language_model(kind: str, tensors: dict[str, Tensor], **settings: Any) -> nn.Module:
    """A vision-language model around the golden file's language model (weights `w.*`); its vision side is idle."""
    from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=AutoConfig.for_model(kind, **settings, rms_norm_eps=1e-6, tie_word_embeddings=False),
        image_token_id=int(tensors["w.lm_head.weight"].shape[0]) - 1,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    weights = {name.removeprefix("w."): tensor for name, tensor in tensors.items() if name.startswith("w.")}
    model.lm_head.load_state_dict({"weight": weights.pop("lm_head.weight")})
    model.model.language_model.load_state_dict({name.removeprefix("model."): weights[name] for name in weights})
    return model


def llama(tensors: dict[str, Tensor]) -> nn.Module:
    """The golden file's Llama, of the sizes that its `config` says."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads")  # fmt: skip
    return language_model("llama", tensors, **dict(zip(sizes, tensors["config"].tolist(), strict=True)))


def places(tensors: dict[str, Tensor], start: int, length: int) -> Tensor:
    """Which of the golden file's inputs are visual: bool [batch, tokens]."""
    visual = torch.zeros(tensors["inputs_embeds"].shape[:2], dtype=torch.bool)
    visual[:, start : start + length] = True
    return visual


def read_then_decode(model: nn.Module, embeddings: Tensor, visual: Tensor, tokens: Tensor) -> tuple[Tensor, Any]:
    """Logits behind the prompt and behind each token, fed one by one, [1 + tokens, vocabulary]; and the cache."""
    text, found = model.model.language_model, []
    set_visual_places(visual)
    with torch.no_grad():
        out = text(inputs_embeds=embeddings, use_cache=True)
        set_visual_places(None)
        found.append(out.last_hidden_state[:, -1])
        for token in tokens:
            out = text(input_ids=token[None, None], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.last_hidden_state[:, -1])
        return model.lm_head(torch.cat(found)), out.past_key_values
