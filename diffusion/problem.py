"""One prompt's sampling problem, as a search sees it: denoise, propose, look ahead, score.

No pipeline and no model in sight: `diffusion.pipelines` makes a problem of a pipeline's call, and the tests make one of
a Gaussian, whose denoiser has a closed form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffusion.particles import Key, Level, Move, Particles, Step, Trail, weighted
from diffusion.steps import ode
from mmaccel.ledger import Ledger

T = TypeVar("T")
Rewards = Float64[Tensor, "rows"]


class Host(Protocol):
    """What a problem needs of the model behind it."""

    seed: int
    """What all randomness of the search derives from, with a key each, see `seed_of`."""

    @property
    def grid(self) -> Level:
        """The pipeline's own levels, [steps + 1], noisiest first; the last one is where its sampling ends."""

    @property
    def eta(self) -> float:
        """How much noise the pipeline itself adds in a step, relative to DDPM's; 0 is deterministic."""

    @property
    def rows_per_evaluation(self) -> int:
        """Denoiser rows that one latent costs: 2 under classifier-free guidance, else 1."""

    def initial(self, chain: int) -> Float[Tensor, "1 *shape"]:
        """The initial noise of a chain, as the pipeline draws it; chain 0 is what the pipeline starts with."""

    def draw(self, key: Key) -> Float[Tensor, "1 *shape"]:
        """Standard normal noise, the same whenever the same key is asked for."""

    def denoise(self, latents: Float[Tensor, "rows *shape"], level: Level) -> tuple[Tensor, Tensor]:
        """(x0, eps) for latents that lie at `level`, [rows], on any path: x = alpha x0 + sigma eps."""

    def sample(self, latents: Float[Tensor, "rows *shape"], chains: Sequence[int]) -> Float[Tensor, "rows *shape"]:
        """From initial to clean latents by the pipeline's own scheduler, `steps` evaluations a row."""

    def rewards(self, latents: Float[Tensor, "rows *shape"]) -> Rewards:
        """Decodes clean latents and scores them.  Anything but a number is -inf here."""

    def times_below(self, level: Level, count: int) -> Level:
        """`count` levels of the pipeline's own path, [count], from `level`, [], down, at even distances to clean."""


@dataclass
class Problem:
    """A host, the ledger that pays for it, and what was found so far.

    rows_per_call: the most latents that go through the model or the reward at once; halved when memory runs out.
    trace: (denoiser rows spent, best reward so far), one entry a scoring.
    """

    host: Host
    ledger: Ledger = field(default_factory=Ledger)
    rows_per_call: int | None = None
    trace: list[tuple[int, float]] = field(default_factory=list)
    best_reward: float = -torch.inf
    best_latents: Tensor | None = None
    best_trail: Trail | None = None

    @property
    def grid(self) -> Level:
        """The pipeline's own levels, [steps + 1], noisiest first."""
        return self.host.grid

    @property
    def steps(self) -> int:
        """The pipeline's number of steps."""
        return len(self.host.grid.sigma) - 1

    @property
    def evaluations_left(self) -> int | None:
        """How many latents may still be denoised; None if nothing limits them."""
        left = self.ledger.left("denoiser_rows")
        return None if left is None else left // self.host.rows_per_evaluation

    def start(self, chains: int, level: Level | None = None, first: int = 0) -> Particles:
        """Initial noises of `chains` chains, numbered from `first`, at the grid's first level, or the level given.

        That level is about as noisy as the grid's; the noises are scaled from one to the other, unless both levels are
        of equal norm, as a flow's and a variance-preserving path's are.
        """
        numbers = range(first, first + chains)
        latents = torch.cat([self.host.initial(chain) for chain in numbers])
        start = None
        if level is not None:
            start = (float(level.alpha), float(level.sigma))
            latents = weighted(torch.hypot(*level) / torch.hypot(*self.grid.at(0)), latents)
        trails = tuple(Trail(chain, start=start) for chain in numbers)
        return Particles(latents, (level or self.grid.at(0)).rows(chains), trails)

    def denoise(self, particles: Particles) -> Particles:
        """The particles with x0 and eps; free if they have them."""
        if particles.x0 is not None:
            return particles
        with self._paid(len(particles)):
            parts = self._in_calls(
                len(particles), lambda rows: self.host.denoise(particles.latents[rows], particles.level.at(rows))
            )
        x0, eps = (torch.cat(values) for values in zip(*parts, strict=True))
        return replace(particles, x0=x0, eps=eps)

    def propose(
        self,
        particles: Particles,
        step: Step,
        at: int | Sequence[int],
        candidates: int = 1,
        first: int = 0,
        slots: Sequence[tuple[int, int]] | None = None,
    ) -> Particles:
        """`candidates` successors of every particle by one step: row = parent * candidates + candidate.

        step: its coefficients are [] or [parents].  at: the step's number, of all or of each parent.
        Row (parent, candidate) uses the noise (at, parent, first + candidate), or (at, *slots[row]).
        """
        parents = self.denoise(particles)
        copies = torch.arange(len(parents)).repeat_interleave(candidates)
        p, q, s = (value.expand(len(parents))[copies] for value in step[:3])
        level = step.level.rows(len(parents)).at(copies)
        ats = [at] * len(parents) if isinstance(at, int) else list(at)
        rows = slots or [
            (parent, first + candidate) for parent in range(len(parents)) for candidate in range(candidates)
        ]
        noisy = bool((s != 0).any())
        keys = [(ats[parent], *slot) if noisy else None for parent, slot in zip(copies.tolist(), rows, strict=True)]
        children = parents if candidates == 1 else parents.gather(copies)
        assert children.x0 is not None and children.eps is not None
        latents = weighted(p, children.x0) + weighted(q, children.eps)
        if noisy:
            noise = torch.cat([self.host.draw(key) for key in keys if key is not None])
            latents = latents + weighted(s, noise.to(latents))
        numbers = zip(*(value.tolist() for value in (p, q, s, *level)), keys, strict=True)
        moves = [Move(*numbers_and_key) for numbers_and_key in numbers]
        trails = tuple(replace(t, moves=(*t.moves, m)) for t, m in zip(children.trails, moves, strict=True))
        return replace(children, latents=latents, level=level, trails=trails, x0=None, eps=None, reward=None)

    def finished(self, particles: Particles) -> Particles:
        """The particles moved to their posterior means: clean latents."""
        return self.propose(particles, ode(Level.of(1.0, 0.0)), at=0)

    def sample(self, particles: Particles) -> Particles:
        """Clean particles from initial ones, by the pipeline's own scheduler through all of its steps."""
        chains = [trail.chain for trail in particles.trails]
        with self._paid(len(particles) * self.steps):
            parts = self._in_calls(len(particles), lambda rows: self.host.sample(particles.latents[rows], chains[rows]))
        trails = tuple(replace(trail, sampled=True) for trail in particles.trails)
        level = Level.of(1.0, 0.0).rows(len(particles))
        return replace(particles, latents=torch.cat(parts), level=level, trails=trails, x0=None, eps=None, reward=None)

    def score(self, latents: Float[Tensor, "rows *shape"], trails: Sequence[Trail]) -> Rewards:
        """Rewards of clean latents; remembers the best ever seen."""
        rewards = torch.cat(self._in_calls(len(latents), lambda rows: self.host.rewards(latents[rows])))
        best = int(rewards.argmax())
        if self.best_latents is None or rewards[best] > self.best_reward:
            self.best_reward = float(rewards[best])
            self.best_latents, self.best_trail = latents[best : best + 1].clone(), trails[best]
        self.trace.append((self.ledger.spent.get("denoiser_rows", 0), self.best_reward))
        return rewards

    def scored(self, particles: Particles, estimate: Tensor | None = None) -> Particles:
        """The particles with the reward of `estimate`, or else of their posterior means."""
        if estimate is None:
            particles = self.denoise(particles)
            estimate = particles.x0
        assert estimate is not None
        return replace(particles, reward=self.score(estimate, particles.trails))

    def _paid(self, evaluations: int) -> AbstractContextManager[None]:
        return self.ledger.spend("denoiser_rows", self.host.rows_per_evaluation * evaluations)

    def _in_calls(self, rows: int, call: Callable[[slice], T]) -> list[T]:
        """What `call` makes of all rows, so many at a time; half as many from then on whenever memory runs out."""
        done: list[T] = []
        start = 0
        while start < rows:
            stop = min(start + (self.rows_per_call or rows), rows)
            try:
                done.append(call(slice(start, stop)))
            except torch.OutOfMemoryError:
                if stop - start == 1:
                    raise
                self.rows_per_call = (stop - start) // 2
                continue
            start = stop
        return done


def seed_of(base: int, *key: int) -> int:
    """A seed of 32 bits (torch's CPU generator reads no more) for `key`, as good as independent of all others."""
    text = ",".join(str(number) for number in (base, *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def normal(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal numbers in float32, drawn on the CPU: the same on every device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
