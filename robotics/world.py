"""A tabletop of real physics under a camera: "push the red disc onto the blue square".

A white pusher moves over a table; discs slide before it, squares are painted on the table.  Physics are pymunk's, the
interface gymnasium's, the drawing that of `mmaccel.pocket.world`.  Lengths are fractions of the table's side, y points
down as in the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from string import ascii_lowercase
from typing import Any

import gymnasium
import numpy as np
import pymunk
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from mmaccel.pocket import world
from mmaccel.pocket.world import Image, Scene, Thing

Vector = NDArray[np.float64]

PIXELS = 96
COLOURS = tuple(colour for colour in world.COLOURS if colour != "white")  # white is the pusher's
DISCS, SQUARES, PUSHER = (0.13, 0.16), (0.2, 0.24), 0.115  # diameters as of `Thing.size`
REACH = 0.05  # how far the pusher moves in a step, at most
STEPS = 60  # of an episode, at most
SUBSTEPS = 8  # of the physics in a step
DRAG = 1e-8  # share of a disc's speed that is left after a unit of time, which is ten steps: felt on wood


@dataclass(frozen=True)
class Tabletop:
    """Where everything lies: the squares, the discs, the pusher; and the seed of the table's texture."""

    squares: tuple[Thing, ...]
    discs: tuple[Thing, ...]
    pusher: Thing
    background: int = 0

    @property
    def scene(self) -> Scene:
        """What the camera sees, the pusher on top."""
        return Scene((*self.squares, *self.discs, self.pusher), self.background)


@dataclass(frozen=True)
class Task:
    """A disc and the square to push it onto, by their places in a tabletop."""

    disc: int
    square: int

    def instruction(self, table: Tabletop) -> str:
        return f"push the {table.discs[self.disc].colour} disc onto the {table.squares[self.square].name}"

    def done(self, table: Tabletop) -> bool:
        """Whether the disc's centre lies in the square."""
        disc, square = table.discs[self.disc], table.squares[self.square]
        return max(abs(disc.x - square.x), abs(disc.y - square.y)) <= half_side(square)


def half_side(square: Thing) -> float:
    return 0.88 * square.size / 2  # as `world` draws it


def place(thing: Thing) -> Vector:
    return np.array([thing.x, thing.y])


def sample_tabletop(rng: np.random.Generator) -> Tabletop:
    """One or two discs and one or two squares, apart from each other, the colours of a kind different."""
    while True:
        discs = _things(rng, "circle", DISCS, 0.22)
        squares = _things(rng, "square", SQUARES, 0.16)
        x, y = rng.uniform(0.08, 0.92, 2).tolist()
        pusher = Thing("circle", "white", x, y, PUSHER)
        apart = [
            *((one, other, 0.26) for one in squares for other in squares if one is not other),
            *((one, other, 0.22) for one in discs for other in discs if one is not other),
            *((disc, square, 0.23) for disc in discs for square in squares),
            *((disc, pusher, 0.16) for disc in discs),
        ]
        if all(np.hypot(*(place(one) - place(other))) >= least for one, other, least in apart):
            return Tabletop(squares, discs, pusher, int(rng.integers(2**31)))


def _things(rng: np.random.Generator, shape: str, sizes: tuple[float, float], border: float) -> tuple[Thing, ...]:
    colours = rng.permutation(len(COLOURS))[: rng.integers(1, 3)]
    centres = rng.uniform(border, 1 - border, (len(colours), 2)).tolist()
    return tuple(
        Thing(shape, COLOURS[colour], x, y, float(rng.uniform(*sizes)))
        for colour, (x, y) in zip(colours, centres, strict=True)
    )


def sample_task(rng: np.random.Generator) -> tuple[Tabletop, Task]:
    """A tabletop and a task on it; no other disc lies in the way from the disc to its square."""
    while True:
        table = sample_tabletop(rng)
        task = Task(int(rng.integers(len(table.discs))), int(rng.integers(len(table.squares))))
        disc, square = table.discs[task.disc], place(table.squares[task.square])
        start, way = place(disc), square - place(disc)
        start = start - way / np.hypot(*way) * (disc.size + PUSHER) / 2  # where the pusher has to stand
        others = [other for other in table.discs if other is not disc]
        if all(_distance(place(other), start, square) > 0.02 + (other.size + disc.size) / 2 for other in others):
            return table, task


def _distance(point: Vector, start: Vector, end: Vector) -> float:
    """From a point to the segment between two others."""
    way = end - start
    along = np.clip((point - start) @ way / (way @ way), 0, 1)
    return float(np.hypot(*(point - start - along * way)))


class Physics:
    """The moving parts of a tabletop.  Deterministic: equal tabletops and actions end in equal ones."""

    def __init__(self, table: Tabletop) -> None:
        self._table = table
        self._space = pymunk.Space()
        self._space.damping = DRAG
        for start, end in (((0, 0), (1, 0)), ((1, 0), (1, 1)), ((1, 1), (0, 1)), ((0, 1), (0, 0))):
            self._space.add(pymunk.Segment(self._space.static_body, start, end, 0.005))
        self._pusher = self._body(table.pusher, pymunk.Body(body_type=pymunk.Body.KINEMATIC))
        self._discs = [self._body(disc, pymunk.Body(mass=1, moment=disc.size**2 / 8)) for disc in table.discs]

    def _body(self, thing: Thing, body: pymunk.Body) -> pymunk.Body:
        body.position = thing.x, thing.y
        shape = pymunk.Circle(body, thing.size / 2)
        shape.friction = 0.3
        self._space.add(body, shape)
        return body

    @property
    def table(self) -> Tabletop:
        """How things lie now."""
        discs = tuple(_moved(disc, body) for disc, body in zip(self._table.discs, self._discs, strict=True))
        return replace(self._table, discs=discs, pusher=_moved(self._table.pusher, self._pusher))

    def step(self, action: Sequence[float] | Vector) -> None:
        """Moves the pusher by an action, of which a length of 1 is `REACH`; it goes no further, nor into a wall."""
        here = np.array(self._pusher.position)
        edge = self._table.pusher.size / 2
        way = REACH * np.asarray(action) / max(1.0, float(np.hypot(*action)))
        there = np.clip(here + way, edge, 1 - edge)
        self._pusher.velocity = tuple((10 * (there - here)).tolist())
        for _ in range(SUBSTEPS):
            self._space.step(0.1 / SUBSTEPS)
        self._pusher.velocity = 0, 0
        self._pusher.position = tuple(there.tolist())  # kinematic bodies drift by rounding


def _moved(thing: Thing, body: pymunk.Body) -> Thing:
    return replace(thing, x=float(body.position.x), y=float(body.position.y))


class Camera:
    """Looks straight down; the table's texture is drawn once."""

    def __init__(self, background: int, pixels: int = PIXELS) -> None:
        self._canvas = world.render(Scene((), background), pixels).astype(np.float32)

    def see(self, table: Tabletop) -> Image:
        """The picture of a tabletop, uint8 [pixels, pixels, 3]."""
        canvas = self._canvas.copy()
        for thing in table.scene.things:
            world.paint(canvas, thing)
        return np.asarray(np.clip(canvas + 0.5, 0, 255), np.uint8)


class PushWorld(gymnasium.Env[dict[str, Any], Vector]):
    """One task a seed.  An action is how the pusher is to move, right and down; a length of 1 is `REACH`, the most.

    An observation holds the camera's "image", uint8 [96, 96, 3], and the "instruction".  The reward is 1 in the step
    that ends in success and 0 before; an episode ends there, or is cut off after `STEPS`.
    Raises ValueError for actions that are no two numbers, and RuntimeError for a step before `reset` or after the end.
    """

    render_mode = "rgb_array"

    def __init__(self) -> None:
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float64)
        self.observation_space = gymnasium.spaces.Dict(
            image=gymnasium.spaces.Box(0, 255, (PIXELS, PIXELS, 3), np.uint8),
            instruction=gymnasium.spaces.Text(80, charset=ascii_lowercase + " "),
        )
        self._over = True

    @property
    def table(self) -> Tabletop:
        """How things lie now, which a policy must not look at and the expert does."""
        return self._physics.table

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """A new episode.  The same seed gives the same one."""
        super().reset(seed=seed)
        table, self.task = sample_task(self.np_random)
        self._physics, self._camera = Physics(table), Camera(table.background)
        self._steps, self._over = 0, False
        self.instruction = self.task.instruction(table)
        return self._observation(table), {"success": False}

    def _observation(self, table: Tabletop) -> dict[str, Any]:
        return {"image": self._camera.see(table), "instruction": self.instruction}

    def step(self, action: Vector) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        numbers = np.asarray(action, np.float64)
        if numbers.shape != (2,) or not np.isfinite(numbers).all():
            raise ValueError(f"an action is a way, right and down, two finite numbers in [-1, 1]; got {action!r}.")
        if self._over:
            raise RuntimeError("no episode is running: call reset(seed=...) first, and again after an episode's end.")
        self._physics.step(numbers)
        self._steps += 1
        table = self.table
        success, late = self.task.done(table), self._steps >= STEPS
        self._over = success or late
        return self._observation(table), float(success), success, late and not success, {"success": success}

    def render(self) -> Image:
        """What the camera sees."""
        return self._camera.see(self.table)


def several(count: int, make: Callable[[], PushWorld] = PushWorld) -> SyncVectorEnv:
    """That many worlds side by side, each to be reset by itself."""
    return SyncVectorEnv([make] * count, autoreset_mode=AutoresetMode.DISABLED)
