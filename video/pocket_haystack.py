"""Long videos of the pocket world: moving shapes for minutes or hours, and questions about events of a few seconds.

>>> haystack = make("haystack.mp4", seconds=600, seed=0)
>>> haystack.events[0].question, haystack.events[0].answer
('where is the red cross?', 'top left')

Every event shows a thing that is seen at no other time; half of them have a cue, another thing that is in view for a
minute around them.  Things keep to their ninth of the picture, so the answer holds for the whole event.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmaccel.films import write_film
from mmaccel.pocket import world
from video.reader import Picture

PIXELS = 128
SIZE = 0.2  # of a thing, of the picture's side
RATE = 5  # frames a second
DRIFT = 0.035  # how far a thing moves from the middle of its ninth, of the picture's side
SCENE = (40.0, 120.0)  # seconds between two cuts
COMMON = (15.0, 60.0)  # seconds for which an ordinary thing is in view
CROWD = 2  # ordinary things in view, about
NAMES = tuple(f"{colour} {shape}" for colour in world.COLOURS for shape in world.SHAPES)
SECONDS_AN_EVENT = 60


@dataclass(frozen=True)
class Stay:
    """A thing in view: its name, its ninth of the picture, from when to when (seconds), and the phase of its motion."""

    name: str
    ninth: int
    begin: float
    end: float
    phase: float

    def at(self, time: float) -> world.Thing:
        """The thing as it stands at a time."""
        colour, shape = self.name.split()
        x, y = ((number + 0.5) / 3 for number in (self.ninth % 3, self.ninth // 3))
        turn = self.phase + time
        return world.Thing(shape, colour, x + DRIFT * np.cos(turn), y + DRIFT * np.sin(1.3 * turn), SIZE)


@dataclass(frozen=True)
class Event:
    """A thing that is seen once, and perhaps another that is in view around it."""

    target: Stay
    cue: Stay | None

    @property
    def centre(self) -> float:
        """The middle of the event, seconds."""
        return (self.target.begin + self.target.end) / 2

    @property
    def question(self) -> str:
        """A question that only the event's frames answer."""
        return f"where is the {self.target.name}?"

    @property
    def answer(self) -> str:
        """The ninth of the picture that the target keeps to."""
        return world.REGIONS[self.target.ninth]


@dataclass(frozen=True)
class PocketHaystack:
    """A generated video and its events in order of time."""

    path: Path
    seconds: float
    events: tuple[Event, ...]


def make(
    path: str | Path,
    seconds: float,
    seed: int = 0,
    *,
    events: int | None = None,
    event_seconds: tuple[float, float] = (6.0, 15.0),
    cue_seconds: float = 60.0,
    rate: int = RATE,
    pixels: int = PIXELS,
    write: bool = True,
) -> PocketHaystack:
    """Writes an H.264 video of the pocket world and says what happens in it; the same for the same arguments.

    events: how many; one a minute up to ten by default, and at most ten, because every one needs names of its own.
    event_seconds: the shortest and longest event; half of the events have a cue in view for `cue_seconds` around them.
    rate: frames a second.  write: False if the file is there already.
    Raises ValueError for more events than fit.
    """
    count = min(10, max(1, int(seconds / SECONDS_AN_EVENT))) if events is None else events
    if not 1 <= count <= 10 or count * event_seconds[1] > seconds:
        raise ValueError(
            f"a pocket haystack has 1 to 10 events that fit into it; got {count} of up to {event_seconds[1]} s in "
            f"{seconds} s. Make the video longer or the events fewer"
        )
    rng = np.random.default_rng((seed, int(seconds / event_seconds[1]), count))  # alike, if all is longer alike
    names = list(rng.permutation(NAMES))
    stays: list[Stay] = []
    made = []
    for number, slot in enumerate(rng.permutation(count)):
        length = rng.uniform(*event_seconds)
        begin = seconds / count * slot + rng.uniform(0, seconds / count - length)
        target = _placed(rng, stays, str(names.pop()), begin, begin + length)
        around = max(0.0, cue_seconds - length) / 2
        span = (max(0.0, begin - around), min(seconds, begin + length + around))
        made.append(Event(target, _placed(rng, stays, str(names.pop()), *span) if number % 2 else None))
    time = 0.0
    while time < seconds:  # ordinary things come and go
        length = rng.uniform(*COMMON)
        _placed(rng, stays, str(rng.choice(names)), time, min(seconds, time + length))
        time += length / CROWD
    if write:
        write_film(path, _drawn(stays, rng, seconds, rate, pixels), rate)
    return PocketHaystack(Path(path), seconds, tuple(sorted(made, key=lambda event: event.centre)))


def _placed(rng: np.random.Generator, stays: list[Stay], name: str, begin: float, end: float) -> Stay:
    """A new stay in a ninth of the picture that is free all the while."""
    taken = {stay.ninth for stay in stays if stay.begin < end and begin < stay.end}
    free = [ninth for ninth in range(9) if ninth not in taken]
    if not free:
        raise ValueError(f"no room for a {name} from {begin:.0f} to {end:.0f} s; ask for fewer events or shorter cues")
    stays.append(Stay(name, int(rng.choice(free)), begin, end, float(rng.uniform(0, 2 * np.pi))))
    return stays[-1]


def _drawn(stays: list[Stay], rng: np.random.Generator, seconds: float, rate: int, pixels: int) -> Iterator[Picture]:
    """The frames in order of time."""
    waiting, shown = sorted(stays, key=lambda stay: -stay.begin), list[Stay]()
    ground, cut = np.empty(0, np.float32), 0.0
    for number in range(int(seconds * rate)):
        time = number / rate
        if time >= cut:
            scene = world.Scene((), int(rng.integers(2**31)))
            ground, cut = world.render(scene, pixels).astype(np.float32), time + rng.uniform(*SCENE)
        while waiting and waiting[-1].begin <= time:
            shown.append(waiting.pop())
        shown = [stay for stay in shown if stay.end > time]
        canvas = ground.copy()
        for stay in shown:
            world.paint(canvas, stay.at(time))
        yield canvas.astype(np.uint8)
