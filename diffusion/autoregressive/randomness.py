"""Random numbers of a run: from one generator for all rows, or from one a row, whatever the other rows do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64, Int
from torch import Generator, Tensor


@dataclass(frozen=True)
class Randomness:
    """What draws the numbers of these rows; see `chains.Draws`.

    generators: one for all, or, with `each`, one for each image of the run.  rows: the images that the numbers are for,
    in order; one may stand there several times.
    """

    generators: tuple[Generator, ...]
    each: bool
    rows: Int[Tensor, "rows"]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, given: Generator | Sequence[Generator] | None, images: int, like: Tensor) -> Randomness:
        """For all images of a run.  Raises ValueError if there are several generators, and not one an image."""
        generators = (
            (torch.default_generator,) if given is None else (given,) if isinstance(given, Generator) else given
        )
        if isinstance(given, Sequence) and len(given) != images:
            raise ValueError(
                f"give one generator, or one for each of the {images} images; got {len(given)}: "
                "[torch.Generator().manual_seed(seed) for seed in range(num_images)]"
            )
        return cls(tuple(generators), isinstance(given, Sequence), torch.arange(images), like.device, like.dtype)

    def at(self, rows: Int[Tensor, "chosen"]) -> Randomness:
        """For the chosen of these rows, which may repeat."""
        return replace(self, rows=self.rows[rows.cpu()])

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, [rows, *shape]."""
        return self._drawn(torch.randn, shape, torch.float32).to(self.device, self.dtype)

    def uniform(self) -> Float64[Tensor, "rows"]:
        """Numbers in [0, 1)."""
        return self._drawn(torch.rand, (), torch.float64).to(self.device)

    def beside(self) -> Randomness:
        """A second stream, independent of what these generators will give, and without drawing from them."""
        return replace(self, generators=tuple(_offspring(generator) for generator in self.generators))

    def _drawn(self, draw: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        def drawn(generator: Generator, size: tuple[int, ...]) -> Tensor:
            return draw(size, generator=generator, device=generator.device, dtype=dtype)

        if not self.each:
            return drawn(self.generators[0], (len(self.rows), *shape))
        if not len(self.rows):
            return torch.empty(0, *shape, dtype=dtype)
        return torch.stack([drawn(self.generators[row], shape) for row in self.rows.tolist()])


def _offspring(generator: Generator) -> Generator:
    state = hashlib.blake2b(bytes(generator.get_state().tolist()), digest_size=8).digest()
    return Generator(generator.device).manual_seed(int.from_bytes(state, "little") >> 1)
