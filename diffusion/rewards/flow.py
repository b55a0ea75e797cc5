"""Dense optical flow between the frames of videos, and warping along it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from diffusion.rewards.pictures import luma

SMALLEST = 16  # pixels a side; OpenCV 5.0's DIS crashes the process on wide pictures that are lower than this


def optical_flow(
    before: Float[Tensor, "*pairs 3 height width"], after: Float[Tensor, "*pairs 3 height width"]
) -> Float[Tensor, "*pairs 2 height width"]:
    """Where each pixel of `before` is found in `after`: (rightward, downward), in pixels; 0 between equal frames.

    Dense inverse search on luma (Kroeger et al. 2016, arXiv:1603.03590), by OpenCV, medium preset, on the CPU.
    Raises ValueError for frames smaller than 16 pixels, ImportError that names the extra if OpenCV is missing.
    """
    height, width = before.shape[-2:]
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"optical flow needs frames of at least {SMALLEST} x {SMALLEST} pixels; got {height} x {width}. Enlarge "
            "them, or use a reward without flow: subject-consistency"
        )
    search = _dense_inverse_search()  # made anew: it holds buffers, which threads must not share
    pairs = [
        rearrange((luma(frames) * 255).round().to(torch.uint8), "... height width -> (...) height width").cpu().numpy()
        for frames in (before, after)
    ]
    flows = np.stack([search.calc(first, second, None) for first, second in zip(*pairs, strict=True)])
    flow = rearrange(torch.from_numpy(flows), "pair height width direction -> pair direction height width")
    return flow.to(before.device).reshape(*before.shape[:-3], 2, height, width)


def warp(
    frames: Float[Tensor, "pairs 3 height width"], flow: Float[Tensor, "pairs 2 height width"]
) -> Float[Tensor, "pairs 3 height width"]:
    """`frames` read at each pixel's place plus its flow; beyond the border, the border's pixel."""
    height, width = frames.shape[-2:]
    rows, columns = torch.meshgrid(
        torch.arange(height, device=frames.device), torch.arange(width, device=frames.device), indexing="ij"
    )
    x = 2 * (columns + flow[:, 0]) / (width - 1) - 1
    y = 2 * (rows + flow[:, 1]) / (height - 1) - 1
    return functional.grid_sample(frames, torch.stack([x, y], dim=-1), padding_mode="border", align_corners=True)


def _dense_inverse_search() -> Any:
    try:
        cv2 = import_module("cv2")
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"rewards of motion compute optical flow with OpenCV, which cannot be imported ({error}); "
            'install it: pip install "mmaccel[video]"'
        ) from error
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
