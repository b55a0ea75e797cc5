"""pocket-vla as a policy: it sees the tabletop from above and answers with the next moves of the pusher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

from robotics.action_tokens import ActionBins, ActionTokenPolicy
from robotics.observations import Observation
from robotics.world import PushWorld

CAMERA = "top"
CHUNK = 4  # actions in an answer
EXECUTE = 2  # of them, before it looks again
THOUGHTS = 10  # tokens before them: where the disc, the square and the pusher are, and two ways from the disc
BINS = 17  # edges between -1 and 1


@dataclass(frozen=True)
class Prompts:
    """The model's arguments for observations: "USER: <image> push the red disc onto the blue square ASSISTANT:"."""

    processor: Any
    device: str = "cpu"

    def __call__(self, observation: Observation) -> Mapping[str, Any]:
        pictures = rearrange(observation.images[CAMERA] * 255, "row channel height width -> row height width channel")
        texts = [f"USER: <image>\n{words} ASSISTANT:" for words in observation.instruction]
        inputs = self.processor(
            images=list(pictures.round().byte().cpu().numpy()), text=texts, padding=True, return_tensors="pt"
        )
        return dict(inputs.to(self.device))


def look(worlds: Sequence[PushWorld], rows: Sequence[int]) -> Observation:
    """What the policy is shown of some of the worlds."""
    pictures = torch.from_numpy(np.stack([worlds[row].render() for row in rows])).float() / 255
    pictures = rearrange(pictures, "row height width channel -> row channel height width")
    return Observation({CAMERA: pictures}, None, [worlds[row].instruction for row in rows], rows=rows)


def load(model: str | Path = "pocket-vla", execute: int = EXECUTE, device: str = "cpu") -> ActionTokenPolicy:
    """The embedded policy, or another training of it.

    model: a pocket model, or the folder of its checkpoint.  execute: how many actions of a chunk are executed before
    it looks again.  Raises what `vision_tokens.loading.load` raises.
    """
    from vision_tokens.loading import load as load_checkpoint

    loaded, processor = load_checkpoint(model)
    return as_policy(loaded.to(device), processor, execute)


def as_policy(model: Any, processor: Any, execute: int = EXECUTE) -> ActionTokenPolicy:
    """The policy that a loaded model is; arguments as of `load`."""
    return ActionTokenPolicy(
        model,
        Prompts(processor, str(model.device)),
        cameras=(CAMERA,),
        dims=2,
        bins=ActionBins(len(processor.tokenizer), BINS),
        horizon=CHUNK,
        execute=execute,
        thoughts=THOUGHTS,
    )
