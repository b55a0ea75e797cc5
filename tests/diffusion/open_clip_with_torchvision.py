"""Run in a process of its own, with open_clip and a torchvision on its path: the adapter on the real library.

Usage: python open_clip_with_torchvision.py LIBRARY_FOLDER WEIGHTS_FOLDER
Prints a JSON object: how far the scores are from open_clip's own, and what the errors say.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

# A torchvision that was built for another torch still imports if the operators that it registers fakes for exist.
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.path.insert(0, sys.argv[1])

import open_clip  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_model  # noqa: E402

from diffusion.rewards import OpenClipScore  # noqa: E402
from tests.diffusion.reward_inputs import pictures  # noqa: E402


def compared(model: str, size: int | tuple[int, int]) -> dict[str, float]:
    """The adapter beside open_clip's own preprocessing and encoders, random weights."""
    torch.manual_seed(0)
    built, _, preprocess = open_clip.create_model_and_transforms(model)
    weights = Path(sys.argv[2]) / f"{model}-{size}.safetensors"
    save_model(built, str(weights))
    images, prompts = pictures(3, size)
    reward = OpenClipScore(model=model, pretrained=weights)
    scores = reward(images, prompts)
    files = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    with torch.no_grad():
        image = built.eval().encode_image(torch.stack([preprocess(file) for file in files]), normalize=True)
        text = built.encode_text(open_clip.get_tokenizer(model)(prompts), normalize=True)
    alone = torch.cat([reward(images[row : row + 1], prompts[row : row + 1]) for row in range(3)])
    return {
        "own": float((scores - (image * text).sum(dim=-1)).abs().max()),
        "rows": float((scores - alone).abs().max()),
        "spread": float(scores.max() - scores.min()),
    }


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "none"


images, prompts = pictures(1)
found = {
    "scores": [compared("ViT-S-32-alt", size) for size in (64, (48, 80))],
    "model": error_of(lambda: OpenClipScore(model="ViT-B-31", pretrained="openai")(images, prompts)),
    "pretrained": error_of(lambda: OpenClipScore(model="ViT-B-32", pretrained="open")(images, prompts)),
}
print(json.dumps(found))
