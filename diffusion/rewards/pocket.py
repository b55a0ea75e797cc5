"""The judge that no reward can fool: the exact parser of the pocket models' world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from diffusion.rewards.inputs import ImageReward, need_prompts
from diffusion.rewards.preprocessing import to_bytes
from mmaccel.pocket import motion, world


@dataclass(frozen=True, kw_only=True)
class PocketJudge(ImageReward):
    """Whether a picture of the pocket world shows what its prompt says: things, colours, counts, relations.

    Range 0 to 1; 1 exactly if all is right.  graded: the share of facts that hold; otherwise 1 or 0.  Videos are judged
    whole, by prompts that say how things move.  Raises ValueError for prompts that are no captions of that world.
    Source: `mmaccel.pocket.world` and `mmaccel.pocket.motion`, which read pictures and clips back exactly, by no model.
    """

    name: ClassVar[str] = "pocket-judge"

    graded: bool = True

    def score(
        self, images: Float[Tensor, "rows 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        judge = world.score if self.graded else world.satisfies
        pairs = zip(need_prompts(self.name, prompts), to_bytes(images), strict=True)
        return images.new_tensor([float(judge(prompt, world.parse(picture))) for prompt, picture in pairs])

    def score_videos(
        self, videos: Float[Tensor, "rows frames 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        judge = motion.score_motion if self.graded else motion.satisfies_motion
        pairs = zip(need_prompts(self.name, prompts), to_bytes(videos), strict=True)
        return videos.new_tensor([float(judge(prompt, frames)) for prompt, frames in pairs])
