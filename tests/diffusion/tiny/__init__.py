"""Tiny random pipelines of the real classes, and calls for them: no download, some milliseconds a forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests.diffusion.tiny.parts import TOKENS
from tests.diffusion.tiny.pictures import (
    dit,
    flux,
    pixart_sigma,
    qwen_image,
    sana,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)
from tests.diffusion.tiny.videos import animatediff, cogvideox, hunyuan_video, ltx, wan, wan_22

PROMPTS = ("four red squares", "a blue circle")
PICTURE = {"height": 16, "width": 16}
VIDEO = {"height": 8, "width": 8, "num_frames": 3}

CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "stable-diffusion": (stable_diffusion, PICTURE),
    "stable-diffusion-xl": (stable_diffusion_xl, PICTURE),
    "stable-diffusion-3": (stable_diffusion_3, {**PICTURE, "max_sequence_length": TOKENS}),
    "flux": (lambda: flux(guidance_embeds=True), {**PICTURE, "max_sequence_length": TOKENS}),
    "flux-true-cfg": (
        flux,
        {**PICTURE, "negative_prompt": "a star", "true_cfg_scale": 3.0, "max_sequence_length": TOKENS},
    ),
    "qwen-image": (qwen_image, {**PICTURE, "negative_prompt": "a star", "true_cfg_scale": 3.0}),
    "sana": (
        sana,
        {
            "height": 32,
            "width": 32,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
            "max_sequence_length": TOKENS,
        },
    ),
    "pixart-sigma": (
        pixart_sigma,
        {**PICTURE, "use_resolution_binning": False, "clean_caption": False, "max_sequence_length": TOKENS},
    ),
    "dit": (dit, {}),
    "wan-2.1": (wan, {**PICTURE, "num_frames": 3, "max_sequence_length": TOKENS}),
    "wan-2.2": (
        wan_22,
        {**PICTURE, "num_frames": 3, "guidance_scale_2": 3.0, "max_sequence_length": TOKENS},
    ),
    "ltx": (ltx, {**VIDEO, "height": 32, "width": 32, "guidance_rescale": 0.3, "max_sequence_length": TOKENS}),
    "cogvideox": (cogvideox, {**VIDEO, "num_frames": 5, "max_sequence_length": TOKENS}),
    "hunyuan-video": (
        hunyuan_video,
        {
            **PICTURE,
            "num_frames": 5,
            "prompt_template": {"template": "{}", "crop_start": 0},
            "max_sequence_length": TOKENS,
        },
    ),
    "animatediff": (animatediff, {**PICTURE, "num_frames": 2}),
}
"""Every pipeline of the matrix: how it is made, and what its calls need beside the prompt."""


@cache
def pipeline(case: str) -> Any:
    """The pipeline of a case, made once: every test gives it back as it was."""
    return fresh(CASES[case][0])


def fresh(make: Callable[[], Any]) -> Any:
    """A pipeline with seeded random weights, wide enough that prompts, times and noises matter."""
    torch.manual_seed(0)
    made = make()
    for name in ("unet", "transformer", "transformer_2"):
        network = getattr(made, name, None)
        if network is not None:
            for parameter in network.parameters():
                if parameter.ndim > 1 or not parameter.any():
                    nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.1)
    made.set_progress_bar_config(disable=True)
    return made


def call(case: str, prompts: int = 1, **more: Any) -> dict[str, Any]:
    """The arguments of a typical call: three steps, pictures as tensors in [0, 1]."""
    words: dict[str, Any] = {"prompt": PROMPTS[0] if prompts == 1 else [*PROMPTS, *PROMPTS][:prompts]}
    if case == "dit":
        words = {"class_labels": [3, 7, 11][:prompts]}
    elif prompts > 1 and "negative_prompt" in CASES[case][1]:
        words["negative_prompt"] = [CASES[case][1]["negative_prompt"]] * prompts
    return {**CASES[case][1], **words, "num_inference_steps": 3, "output_type": "pt", **more}


def seeded(*seeds: int) -> Any:
    """Generators, fresh; one alone is no list."""
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made if len(made) > 1 else made[0]


def brightness(images: Tensor, prompts: Any, **context: Any) -> Tensor:
    """A reward of pictures and videos: their mean."""
    return images.flatten(1).mean(dim=1)
