"""How well a picture fits its prompt, by CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from diffusion.rewards.encoders import clip_encoder
from diffusion.rewards.inputs import ImageReward, need_prompts


@dataclass(frozen=True, kw_only=True)
class ClipScore(ImageReward):
    """How well a picture fits its prompt: the cosine similarity of their CLIP embeddings.

    Range -1 to 1, no unit; published CLIP models give about 0.1 to 0.4, pocket-clip 0 to 1.  model: a CLIP checkpoint
    folder of transformers, or pocket-clip, which knows coloured shapes only.  Prompts longer than the text encoder's
    context (CLIP's 77 tokens) are cut there, as everywhere with CLIP.
    Source: Hessel et al. 2021 (arXiv:2104.08718), eq. 1, without its factor 2.5 and its clipping at 0, which would make
    all poor candidates equal.
    """

    name: ClassVar[str] = "clip-score"

    model: str | Path = "pocket-clip"

    def score(
        self, images: Float[Tensor, "rows 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        texts = need_prompts(self.name, prompts)
        clip = clip_encoder(self.name, str(self.model), images.device)
        return (clip.images(images) * clip.texts(texts)).sum(dim=-1)
