"""What a search moves: noisy latents, each at its own noise level, with everything that belongs to them.

A level says how much signal and noise a latent holds: x = alpha x0 + sigma eps.  Every proposal of every method is one
`Step`, x' = p x0 + q eps + s z, from the denoiser's estimates (x0, eps) at x and fresh noise z; so a particle is
retold, alone, by its start and its list of moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

Key = tuple[int, int, int]
"""Which noise: (step, chain, candidate)."""


class Level(NamedTuple):
    """x = alpha x0 + sigma eps.  Both float64 on the CPU, [] or [rows]."""

    alpha: Float64[Tensor, "*rows"]
    sigma: Float64[Tensor, "*rows"]

    @classmethod
    def of(cls, alpha: float | Tensor, sigma: float | Tensor) -> Level:
        """A level from numbers or tensors."""
        return cls(torch.as_tensor(alpha, dtype=torch.float64), torch.as_tensor(sigma, dtype=torch.float64))

    def at(self, index: Any) -> Level:
        """The levels of some rows."""
        return Level(self.alpha[index], self.sigma[index])

    def rows(self, count: int) -> Level:
        """This level for each of `count` rows."""
        return Level(self.alpha.expand(count), self.sigma.expand(count))


class Step(NamedTuple):
    """x' = p x0 + q eps + s z, which lies at `level`.  Coefficients are float64, [] or [rows]."""

    p: Float64[Tensor, "*rows"]
    q: Float64[Tensor, "*rows"]
    s: Float64[Tensor, "*rows"]
    level: Level

    def at(self, index: Any) -> Step:
        """The steps of some rows, or one of several steps."""
        return Step(self.p[index], self.q[index], self.s[index], self.level.at(index))


class Move(NamedTuple):
    """A step that one particle made: its coefficients, the level it led to, and the noise it used (None: none)."""

    p: float
    q: float
    s: float
    alpha: float
    sigma: float
    noise: Key | None


@dataclass(frozen=True)
class Trail:
    """How a particle came to be: the seed of its initial noise, or the chain it started as, and its moves.

    start: (alpha, sigma) of the level that it started at; None is the first of the pipeline's own grid.
    turns: rotations of the initial noise, (cosine, key) each, see `noise_search.neighbour`.
    sampled: whether the pipeline's own scheduler took it from there to the clean sample.
    """

    chain: int
    moves: tuple[Move, ...] = ()
    turns: tuple[tuple[float, Key], ...] = ()
    sampled: bool = False
    start: tuple[float, float] | None = None


@dataclass(frozen=True)
class Particles:
    """Rows of a search.

    latents: [rows, ...] in float32.  x0, eps: what the denoiser sees in them, likewise, None before it was asked.
    reward: [rows], None before they were scored.
    """

    latents: Float[Tensor, "rows *shape"]
    level: Level
    trails: tuple[Trail, ...]
    x0: Float[Tensor, "rows *shape"] | None = None
    eps: Float[Tensor, "rows *shape"] | None = None
    reward: Float64[Tensor, "rows"] | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    """What a method keeps a row: log weights, earlier rewards; [rows, ...] each."""

    def __len__(self) -> int:
        return len(self.latents)

    def gather(self, index: Int64[Tensor, "kept"] | Sequence[int]) -> Particles:
        """The rows of `index`, in its order; a row may be taken several times.  Branches all that belongs to them."""
        index = torch.as_tensor(index, dtype=torch.int64)
        there = index.to(self.latents.device)
        return replace(
            self,
            latents=self.latents[there],
            level=self.level.at(index),
            trails=tuple(self.trails[row] for row in index.tolist()),
            x0=None if self.x0 is None else self.x0[there],
            eps=None if self.eps is None else self.eps[there],
            reward=None if self.reward is None else self.reward[index],
            extra={name: value[index.to(value.device)] for name, value in self.extra.items()},
        )

    def with_latents(self, latents: Float[Tensor, "rows *shape"]) -> Particles:
        """The rows with other latents, of which the denoiser and the reward know nothing yet."""
        return replace(self, latents=latents, x0=None, eps=None, reward=None)

    def repeat(self, copies: int) -> Particles:
        """Every row `copies` times, copies of a row side by side: row = parent * copies + copy."""
        return self.gather(torch.arange(len(self)).repeat_interleave(copies))

    def best(self, count: int | None = None) -> Particles:
        """The rows of highest reward, best first; equal rewards keep their order."""
        assert self.reward is not None
        return self.gather(self.reward.argsort(descending=True, stable=True)[:count])

    def ancestors(self) -> int:
        """How many different initial chains these rows stem from."""
        return len({trail.chain for trail in self.trails})


def concatenate(parts: Sequence[Particles]) -> Particles:
    """All rows of all parts, which carry the same things."""
    first = parts[0]

    def joined(name: str) -> Any:
        return None if getattr(first, name) is None else torch.cat([getattr(part, name) for part in parts])

    return Particles(
        latents=joined("latents"),
        level=Level(*(torch.cat([part.level[place] for part in parts]) for place in (0, 1))),
        trails=tuple(trail for part in parts for trail in part.trails),
        x0=joined("x0"),
        eps=joined("eps"),
        reward=joined("reward"),
        extra={name: torch.cat([part.extra[name] for part in parts]) for name in first.extra},
    )


def weighted(coefficient: Tensor, values: Tensor) -> Tensor:
    """coefficient, [] or [rows], times values, [rows, ...], in the values' dtype."""
    shape = (-1, *(1 for _ in values.shape[1:])) if coefficient.ndim else ()
    return coefficient.to(values).reshape(shape) * values
