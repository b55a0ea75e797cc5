"""What the tiny models share: their sizes, and prompts for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IMAGE, VIDEO, PAD, VOCABULARY = 99, 98, 0, 100
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 48,
    "patch_size": 8,
    "initializer_range": 0.2,
}
PINPOINTS = [[48, 96], [96, 48], [96, 96], [48, 144], [144, 48]]


@dataclass(frozen=True)
class Prompts:
    """Rows of a prompt: per row its image sizes (height, width in pixels) and its number of text tokens.

    videos: per row the number of frames of each of its videos, which stand behind its images.
    first: number of the first row; a row's words and pictures depend on its number and the seed alone.
    """

    images: Sequence[Sequence[tuple[int, int]]] = ((((96, 70)),),)
    text: Sequence[int] = (7,)
    side: str = "left"
    seed: int = 0
    videos: Sequence[Sequence[int]] = ()
    first: int = 0

    def row(self, number: int) -> Prompts:
        """One row, as it stands in the batch."""
        return replace(
            self,
            images=(self.images[number],),
            text=(self.text[number],),
            videos=(self.videos[number],) if self.videos else (),
            first=self.first + number,
        )

    @property
    def flat(self) -> list[tuple[int, int, tuple[int, int]]]:
        """Every image: its row, its number in the row, and its size."""
        return [(row, number, size) for row, sizes in enumerate(self.images) for number, size in enumerate(sizes)]

    @property
    def flat_videos(self) -> list[tuple[int, int, int]]:
        """Every video: its row, its number in the row, and its frames."""
        return [(row, number, frames) for row, all in enumerate(self.videos) for number, frames in enumerate(all)]

    def picture(self, row: int, number: int, shape: tuple[int, ...]) -> Tensor:
        """Random pixels of one of a row's pictures; videos are numbered from 100."""
        return picture(self.first + row, number, shape, self.seed)

    def words(self, row: int) -> list[int]:
        """A row's text."""
        generator = torch.Generator().manual_seed(1000 + 37 * (self.first + row) + self.seed)
        return torch.randint(3, 90, (self.text[row],), generator=generator).tolist()


def picture(row: int, number: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random pixels that depend on the picture's place in the prompts alone."""
    generator = torch.Generator().manual_seed(7 + 31 * row + 1009 * number + 100003 * seed)
    return torch.randn(shape, generator=generator)
