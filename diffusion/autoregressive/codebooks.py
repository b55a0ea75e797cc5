"""What discrete image tokens look like: a codebook of patches, beside the checkpoint of the model that draws them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

FILE = "preprocessor_config.json"  # where ImageGPT's checkpoints keep their clusters of colours


@dataclass(frozen=True)
class Codebook:
    """A square patch of pixels for each token: clusters in [-1, 1], by row, column and colour.

    Three numbers a token are a pixel each, as ImageGPT's published checkpoints have them; twelve are 2 x 2 pixels.
    Raises ValueError if the clusters are no square patches.
    """

    clusters: Float[Tensor, "codes numbers"]

    def __post_init__(self) -> None:
        if 3 * self.patch**2 != self.clusters.shape[1]:
            raise ValueError(
                f"a cluster is a square of pixels, so 3, 12, 27, ... numbers; got {self.clusters.shape[1]}"
            )

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Codebook:
        """Raises FileNotFoundError if the checkpoint in this folder has no clusters."""
        file = Path(folder) / FILE
        clusters = json.loads(file.read_text()).get("clusters") if file.exists() else None
        if clusters is None:
            raise FileNotFoundError(
                f"{file} has no `clusters`, which say what the tokens look like; save them there with Codebook.save"
            )
        return cls(torch.tensor(clusters))

    def save(self, folder: Path | str) -> None:
        """Write the clusters, to four digits."""
        clusters = [[round(number, 4) for number in row] for row in self.clusters.tolist()]
        (Path(folder) / FILE).write_text(json.dumps({"clusters": clusters}) + "\n")

    @property
    def patch(self) -> int:
        """Pixels on a side of a patch."""
        return isqrt(self.clusters.shape[1] // 3)

    def encode(self, pictures: Float[Tensor, "images 3 height width"]) -> Int[Tensor, "images places"]:
        """The nearest cluster at each place.  pictures: in [-1, 1]."""
        return torch.cdist(cut(pictures, self.patch), self.clusters).argmin(dim=-1)

    def decode(self, tokens: Int[Tensor, "images places"]) -> Float[Tensor, "images 3 side side"]:
        """Square pictures in [-1, 1].

        Raises ValueError if the tokens fill no square, or are not all in the codebook.
        """
        rows = isqrt(tokens.shape[1])
        if rows**2 != tokens.shape[1]:
            raise ValueError(f"tokens fill a square picture row by row; got {tokens.shape[1]} a picture")
        if int(tokens.max()) >= len(self.clusters):
            raise ValueError(
                f"the codebook has {len(self.clusters)} tokens; got token {int(tokens.max())}. Leave the prompt away"
            )
        return rearrange(
            self.clusters[tokens], "images (rows columns) (y x colours) -> images colours (rows y) (columns x)",
            rows=rows, y=self.patch, x=self.patch,
        )  # fmt: skip


def cut(pictures: Float[Tensor, "images 3 height width"], patch: int) -> Float[Tensor, "images places numbers"]:
    """The patches of pictures in raster order, each by row, column and colour."""
    return rearrange(
        pictures, "images colours (rows y) (columns x) -> images (rows columns) (y x colours)", y=patch, x=patch
    )


def clustered(pictures: Float[Tensor, "images 3 height width"], codes: int, patch: int, seed: int) -> Codebook:
    """A codebook by k-means over the different patches of pictures, each counted once: backgrounds repeat."""
    from scipy.cluster.vq import kmeans2

    different = np.unique(cut(pictures, patch).flatten(0, 1).numpy(), axis=0)
    clusters, _ = kmeans2(different, codes, iter=10, minit="++", rng=seed)
    return Codebook(torch.from_numpy(clusters).float())
