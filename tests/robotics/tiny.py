"""Tiny random policies of the real classes, and observations for them."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from robotics import ActionBins, ActionTokenPolicy, LerobotPolicy, Observation, PI0Policy
from tests.vision_tokens.deep import build_deep
from tests.vision_tokens.tiny import IMAGE, TOWER

CAMERAS = ("top", "wrist")
PATCHES = 36  # of a picture of 48 px
BINS = ActionBins(vocabulary=98, bins=17)
LAYERS = 6
HORIZON, DIMS = 6, 3


def observation(rows: int = 2, step: int = 0, cameras: tuple[str, ...] = CAMERAS, first: int = 0, **given: Any) -> Any:
    """Pictures that drift slowly with the step; a row's own whatever the batch."""
    images: dict[str, list[Tensor]] = {name: [] for name in cameras}
    states, words = [], []
    for row in range(first, first + rows):
        generator = torch.Generator().manual_seed(100 + row)
        for name in cameras:
            still, drift = torch.rand(2, 3, 48, 48, generator=generator)
            images[name].append((still + 0.1 * step * drift).clamp(max=1))
        states.append(torch.randn(5, generator=generator))
        words.append(f"push disc {row}")
    made = {"images": {name: torch.stack(own) for name, own in images.items()}, "state": torch.stack(states)}
    return Observation(**{**made, "instruction": words, **given})


def words_of(instruction: str) -> list[int]:
    """Token ids for a sentence, in place of a tokenizer."""
    return [3 + sum(map(ord, word)) % 60 for word in instruction.split()]


def llava_inputs(seen: Observation) -> dict[str, Tensor]:
    """The arguments of generate: one picture after the other, then the words; rows are padded on the left."""
    cameras = list(seen.images)
    rows = [[1, *[IMAGE] * PATCHES * len(cameras), *words_of(said)] for said in seen.instruction]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    pixels = torch.stack([seen.images[name] for name in cameras], dim=1).flatten(0, 1) * 2 - 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def token_policy(
    family: str = "llava", cameras: tuple[str, ...] = CAMERAS, attention: str = "sdpa", horizon: int = 1
) -> ActionTokenPolicy:
    """A model that answers with action tokens."""

    def prepare(seen: Observation) -> dict[str, Tensor]:
        inputs = llava_inputs(seen)
        more = {"token_type_ids": torch.zeros_like(inputs["input_ids"])} if family == "paligemma" else {}
        return {**inputs, **more}

    model = build_deep(family, attention)
    return ActionTokenPolicy(model, prepare, cameras=cameras, dims=DIMS, bins=BINS, horizon=horizon)


@cache
def build_pi0(attention: str = "sdpa", seed: int = 0) -> nn.Module:
    """transformers' pi0 with `LAYERS` layers."""
    from transformers import PI0Config, PI0ForConditionalGeneration

    torch.manual_seed(seed)
    text = {
        "model_type": "gemma", "hidden_size": 32, "num_hidden_layers": LAYERS, "intermediate_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100, "initializer_range": 0.2,
    }  # fmt: skip
    vision = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
    config = PI0Config(
        vlm_config={
            "model_type": "paligemma", "text_config": text, "vision_config": vision, "projection_dim": 32,
            "image_token_id": IMAGE,
        },
        dit_config={**text, "hidden_size": 16, "intermediate_size": 32},
        chunk_size=HORIZON, max_state_dim=5, max_action_dim=4, num_inference_steps=3,
    )  # fmt: skip
    config._attn_implementation = attention
    model = PI0ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter.std() < 0.1:
                parameter.normal_(std=0.2)
    return model.eval()


def pi0_inputs(seen: Observation) -> dict[str, Tensor]:
    """The arguments of sample_actions: cameras that show something first, padding on the right."""
    cameras = list(seen.images)
    shown = seen.shown(cameras)
    rows = [
        [*[IMAGE] * PATCHES * int(own.sum()), 1, *words_of(said)]
        for own, said in zip(shown, seen.instruction, strict=True)
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    pixels = torch.stack([seen.images[name] for name in cameras], dim=1) * 2 - 1
    return {
        "input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "pixel_attention_mask": shown,
        "state": seen.state,
    }  # fmt: skip


def pi0_policy(cameras: tuple[str, ...] = CAMERAS, attention: str = "sdpa") -> PI0Policy:
    """A flow-matching policy."""
    return PI0Policy(build_pi0(attention), pi0_inputs, cameras=cameras, dims=DIMS)


class Lerobot:
    """What lerobot's documentation promises of a policy, with a random straight line for a chunk."""

    config = SimpleNamespace(chunk_size=HORIZON, n_action_steps=4, n_obs_steps=1)

    def __init__(self) -> None:
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def predict_action_chunk(self, batch: dict[str, Any]) -> Tensor:
        state = batch["observation.state"]
        batch["observation.state"] = None  # some policies change what they are given
        slope = torch.randn(len(state), 1, DIMS)
        return state[:, None, :DIMS] + slope * torch.linspace(0, 1, HORIZON)[None, :, None]


def lerobot_policy() -> LerobotPolicy:
    """A stand-in behind the adapter."""
    return LerobotPolicy(Lerobot(), cameras=CAMERAS, dims=DIMS)


POLICIES = {"tokens": token_policy, "pi0": pi0_policy, "lerobot": lerobot_policy}
