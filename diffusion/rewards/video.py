"""Rewards of videos: motion, its smoothness, and what stays the same.

A still video is perfectly smooth and consistent, and a flickering one moves a lot: any of these alone is easily gamed,
so combine them with `Calibrated`.  VBench (Huang et al. 2023, arXiv:2311.17982) and the latent beam search paper
measure motion with RAFT and interpolate with AMT; here dense inverse search by OpenCV does both, without weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from diffusion.rewards.encoders import encoder
from diffusion.rewards.flow import optical_flow, warp
from diffusion.rewards.inputs import VideoReward

STILL = 1e-3  # pixels a frame below which the logarithm takes a video for a still


@dataclass(frozen=True, kw_only=True)
class MotionMagnitude(VideoReward):
    """How much moves: the mean length of the optical flow, over pixels and pairs of neighbouring frames.

    In pixels a frame, from 0; it doubles with the resolution.  log: log(length) / 16 instead, the length being at least
    0.001 pixels; what the paper combines with other rewards.
    Source: dynamic degree of VBench and of Oshima et al. 2025, latent beam search (arXiv:2501.19252), there with RAFT.
    """

    name: ClassVar[str] = "motion-magnitude"

    log: bool = False

    def score(
        self, videos: Float[Tensor, "rows frames 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        flow = optical_flow(videos[:, :-1], videos[:, 1:])
        magnitude = flow.square().sum(dim=2).sqrt().flatten(1).mean(dim=1)
        return magnitude.clamp(min=STILL).log() / 16 if self.log else magnitude


@dataclass(frozen=True, kw_only=True)
class MotionSmoothness(VideoReward):
    """How well each frame is foretold by the two around it: 1 minus the mean absolute error of its interpolation.

    Range 0 to 1; 1 for a still video.  Both neighbours are warped half-way along the flow between them and averaged.
    Source: motion smoothness of VBench, there with AMT as interpolator and on every second frame only.
    """

    name: ClassVar[str] = "motion-smoothness"
    fewest_frames: ClassVar[int] = 3

    def score(
        self, videos: Float[Tensor, "rows frames 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        before, between, after = (_joined(part) for part in (videos[:, :-2], videos[:, 1:-1], videos[:, 2:]))
        flow = optical_flow(before, after)
        foretold = (warp(before, -flow / 2) + warp(after, flow / 2)) / 2
        return 1 - _mean_error(foretold, between, len(videos))


@dataclass(frozen=True, kw_only=True)
class TemporalConsistency(VideoReward):
    """How well each frame follows from the next along the optical flow: 1 minus the mean absolute difference.

    Range 0 to 1; 1 for a still video, and near it for things that move without changing; flicker lowers it.
    Source: the warping error of Lai et al. 2018 (arXiv:1808.00449), absolute, and without its mask of occluded pixels:
    of frames that have nothing in common, a mask would hide everything.
    """

    name: ClassVar[str] = "temporal-consistency"

    def score(
        self, videos: Float[Tensor, "rows frames 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        before, after = _joined(videos[:, :-1]), _joined(videos[:, 1:])
        return 1 - _mean_error(warp(after, optical_flow(before, after)), before, len(videos))


@dataclass(frozen=True, kw_only=True)
class SubjectConsistency(VideoReward):
    """How alike the frames are to an encoder: similarity to the previous and to the first frame, averaged.

    Range 0 to 1; 1 for a still video.  Cosines below 0 count as 0, as in VBench.  model: a checkpoint folder whose
    image encoder is compared: CLIP's embedding, or the class token of a ViT such as DINO, which the papers use.
    Source: subject consistency of VBench and of Oshima et al. 2025 (arXiv:2501.19252).
    """

    name: ClassVar[str] = "subject-consistency"

    model: str | Path = "pocket-clip"

    def score(
        self, videos: Float[Tensor, "rows frames 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        features = encoder(self.name, str(self.model), videos.device).images(_joined(videos))
        features = rearrange(features, "(rows frames) channel -> rows frames channel", rows=len(videos))
        later = features[:, 1:]
        to_previous = (later * features[:, :-1]).sum(dim=-1).clamp(min=0)
        to_first = (later * features[:, :1]).sum(dim=-1).clamp(min=0)
        return ((to_previous + to_first) / 2).mean(dim=1)


def _joined(videos: Float[Tensor, "rows frames 3 height width"]) -> Float[Tensor, "all 3 height width"]:
    return rearrange(videos, "rows frames channel height width -> (rows frames) channel height width")


def _mean_error(
    first: Float[Tensor, "all 3 height width"], second: Float[Tensor, "all 3 height width"], rows: int
) -> Float[Tensor, " rows"]:
    return (first - second).abs().reshape(rows, -1).mean(dim=1)
