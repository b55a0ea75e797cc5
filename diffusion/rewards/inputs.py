"""Rewards of pictures and rewards of videos, and the rules that all of ours share.

One rule for video: a reward for pictures scores every frame by itself and gives the mean; a reward for videos refuses
pictures.  One rule for broken pictures: a row that holds a NaN or an infinity scores NaN, which never wins, see
`diffusion.rewards.checking`.  Rewards are computed in float32 on the device of the images, whatever the pipeline's
dtype, and without gradients.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from diffusion.rewards.base import Prompts, Reward


class ImageReward(Reward):
    """A reward of single pictures: subclasses write `score`."""

    @abstractmethod
    def score(
        self, images: Float[Tensor, "rows 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        """The reward of every picture."""

    def score_videos(
        self, videos: Float[Tensor, "rows frames 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        """The mean over the frames of what each scores by itself."""
        frames = videos.shape[1]
        scores = self.score(
            rearrange(videos, "rows frames channel height width -> (rows frames) channel height width"),
            [prompt for prompt in prompts for _ in range(frames)],
        )
        return rearrange(scores, "(rows frames) -> rows frames", frames=frames).mean(dim=1)

    def __call__(self, images: Tensor, prompts: Prompts | None, **context: Any) -> Tensor:
        prompts = check_input(self.name, images, prompts)
        return apply_score(self.score if images.ndim == 4 else self.score_videos, images, prompts)


class VideoReward(Reward):
    """A reward of whole videos: subclasses write `score`."""

    fewest_frames: ClassVar[int] = 2

    @abstractmethod
    def score(
        self, videos: Float[Tensor, "rows frames 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        """The reward of every video."""

    def __call__(self, images: Tensor, prompts: Prompts | None, **context: Any) -> Tensor:
        prompts = check_input(self.name, images, prompts)
        if images.ndim == 4:
            raise ValueError(
                f"{self.name} scores videos, [rows, frames, 3, height, width]; got pictures, {list(images.shape)}. Use "
                "a reward for pictures, such as clip-score, or pass the frames of a row together: images[None]"
            )
        if images.shape[1] < self.fewest_frames:
            raise ValueError(
                f"{self.name} compares frames and needs at least {self.fewest_frames} of them; got {images.shape[1]}. "
                "Ask the pipeline for more with num_frames"
            )
        return apply_score(self.score, images, prompts)


def apply_score(score: Callable[[Tensor, Prompts], Tensor], images: Tensor, prompts: Prompts) -> Tensor:
    """`score` of images that passed `check_input`; NaN for every row that is not finite."""
    if len(images) == 0:
        return images.new_zeros(0, dtype=torch.float32)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        images = images.float()
        finite = images.flatten(1).isfinite().all(dim=1)
        if finite.all():
            return score(images, prompts)
        return score(images.nan_to_num(0, 0, 0), prompts).masked_fill(~finite, torch.nan)


def check_input(name: str, images: Tensor, prompts: Prompts | None) -> Prompts:
    """The prompts, one a row.  Raises TypeError or ValueError, with the mend, for anything but the contract's input."""
    shapes = "[rows, 3, height, width], or for video [rows, frames, 3, height, width]"
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{name} scores a tensor {shapes}; got {type(images).__name__}. "
            'Pipelines give tensors with output_type="pt"'
        )
    shape = list(images.shape)
    if images.ndim not in (4, 5) or shape[-3] != 3:
        channels_first = images.ndim == 5 and shape[1] == 3
        mend = "frames stand before the channels: images.transpose(1, 2)" if channels_first else "the 3 are RGB"
        raise ValueError(f"{name} scores a tensor {shapes}; got {shape}; {mend}")
    if not images.is_floating_point():
        raise TypeError(f"{name} scores floats in 0..1; got {images.dtype}. Pass images.float() / 255")
    if images.numel():
        low, high = images.nan_to_num(0, 0, 0).aminmax()
        if low < -1e-3 or high > 1 + 1e-3:
            raise ValueError(
                f"{name} scores floats in 0..1; got values from {low:.3g} to {high:.3g}. From the range of a decoder, "
                "-1..1, pass (images / 2 + 0.5).clamp(0, 1)"
            )
    if prompts is None:
        return [None] * len(images)
    if isinstance(prompts, str) or len(prompts) != len(images):
        got = repr(prompts) if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(f"{name} takes a list of prompts, one a row; got {got} for {len(images)} rows")
    return prompts


def need_prompts(name: str, prompts: Prompts) -> list[str]:
    """The prompts, all of them text.  Raises ValueError, with the mend, if a row has none."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(texts) < len(prompts):
        row = next(row for row, prompt in enumerate(prompts) if not isinstance(prompt, str))
        raise ValueError(
            f"{name} compares pictures with their prompts, but row {row} has the prompt {prompts[row]!r}. Give the "
            "pipeline a prompt, or use a reward that needs none, such as aesthetic or colourfulness"
        )
    return texts
