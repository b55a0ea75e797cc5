"""The benchmark harness: interleaved timings, paired intervals, and results as plain data.  Knows no domain.

A bench is a frozen dataclass whose fields are its options, found through the entry-point group `mmaccel.benches`:

>>> bench = get_bench("vision-tokens").from_options({"part": "speed", "rounds": 5})
>>> result = bench.run(progress)  # progress(what, done, total) is called as the work goes on
>>> result.save("result.json")
>>> bench.plot(result, "result.png")

Two rules make figures comparable.  Timings are compared within one run only: the candidates take turns, and what is
reported is a ratio of medians.  Qualities are compared on the same items only: intervals come from resampling items,
each with all of its outcomes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmaccel.registry import entries, find_class, suggest

Samples = NDArray[np.float64]
Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`."""


def silent(what: str, done: int, total: int) -> None:
    """The progress that shows nothing."""


# Figures and results


@dataclass(frozen=True)
class Figure:
    """A measured value and, where it has one, its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{interval} {self.unit}".rstrip()


@dataclass
class BenchResult:
    """What a bench found: figures by stable names, and the rows of its tables."""

    bench: str
    machine: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The result that `to_dict` described."""
        figures = {name: Figure(**figure) for name, figure in data["figures"].items()}
        return cls(data["bench"], dict(data["machine"]), figures, list(data["rows"]))

    def save(self, path: str | Path) -> None:
        """Writes the result as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a result that `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """What a timing depends on: processor, cores, threads, versions, and the device's name."""
    import torch

    on_gpu = torch.device(device).type == "cuda"
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


# Timing


def interleave(
    runs: Mapping[str, Callable[[], Mapping[str, float]]],
    rounds: int,
    warmup: int = 1,
    progress: Progress = silent,
) -> dict[str, dict[str, Samples]]:
    """Lets every run take its turn in every round, and gathers what each says about itself.

    runs: each returns its figures of one turn by name, e.g. {"seconds": 0.2}.  Every second round goes backwards, so
    that a machine that slows down steadily slows all of them alike.  warmup: rounds that are not counted.
    Returns the figures by run and name, one entry a round: entries of one round are paired.
    """
    if rounds < 1 or not runs:
        raise ValueError(f"interleaved runs need something to run and at least one round; got {rounds} rounds of "
                         f"{len(runs)} runs")  # fmt: skip
    gathered: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    total = (warmup + rounds) * len(runs)
    for turn in range(warmup + rounds):
        order = list(runs)[:: 1 if turn % 2 == 0 else -1]
        for place, name in enumerate(order):
            progress(name, turn * len(runs) + place, total)
            figures = runs[name]()
            if turn >= warmup:
                for key, value in figures.items():
                    gathered[name].setdefault(key, []).append(float(value))
    progress("done", total, total)
    return {name: {key: np.asarray(values) for key, values in figures.items()} for name, figures in gathered.items()}


def timed(function: Callable[[], object], wait: Callable[[], object] | None = None) -> Callable[[], dict[str, float]]:
    """A run for `interleave` that says how many seconds `function` took.

    wait: called before the clock is read, e.g. `torch.cuda.synchronize`.
    """

    def run() -> dict[str, float]:
        if wait is not None:
            wait()
        start = time.perf_counter()
        function()
        if wait is not None:
            wait()
        return {"seconds": time.perf_counter() - start}

    return run


# Intervals


def bootstrap(
    statistic: Callable[..., Samples],
    *samples: ArrayLike,
    unit: str = "",
    resamples: int = 4000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Figure:
    """A statistic of paired samples, with its percentile-bootstrap interval.

    statistic: takes as many arrays as there are samples and reduces their last axis.
    samples: equally long; entry i of all of them belongs to one item (or round), and items are drawn together.
    Raises ValueError if they differ in length or are empty.  The same seed gives the same interval.
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "a paired bootstrap needs samples over the same items, at least one; got lengths "
            f"{', '.join(str(len(array)) for array in arrays)}"
        )
    rng, items = np.random.default_rng(seed), lengths.pop()
    found: list[Samples] = []
    block = max(1, 1_000_000 // items)  # resamples held in memory at a time
    for start in range(0, resamples, block):
        drawn = rng.integers(items, size=(min(block, resamples - start), items))
        found.append(statistic(*(array[drawn] for array in arrays)))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.concatenate(found), [tail, 100 - tail])
    return Figure(float(statistic(*arrays)), float(low), float(high), unit)


def median(sample: ArrayLike, unit: str = "", seed: int = 0) -> Figure:
    """The median over rounds."""
    return bootstrap(lambda values: np.median(values, axis=-1), sample, unit=unit, seed=seed)


def median_ratio(above: ArrayLike, below: ArrayLike, unit: str = "x", seed: int = 0) -> Figure:
    """The ratio of the medians of two interleaved runs; the interval resamples rounds."""
    return bootstrap(
        lambda first, second: np.median(first, axis=-1) / np.median(second, axis=-1), above, below, unit=unit, seed=seed
    )


def mean(sample: ArrayLike, unit: str = "", seed: int = 0) -> Figure:
    """The mean over items."""
    return bootstrap(lambda values: values.mean(axis=-1), sample, unit=unit, seed=seed)


def mean_difference(first: ArrayLike, second: ArrayLike, unit: str = "", seed: int = 0) -> Figure:
    """The mean of first - second over the same items."""
    return bootstrap(lambda one, other: (one - other).mean(axis=-1), first, second, unit=unit, seed=seed)


def mean_ratio(above: ArrayLike, below: ArrayLike, unit: str = "x", seed: int = 0) -> Figure:
    """The ratio of two means over the same items.  Raises ValueError if the lower mean is zero."""
    if not np.any(np.asarray(below)):
        raise ValueError("the ratio of two means needs a lower one that is not zero; compare with mean_difference")
    tiny = np.finfo(np.float64).tiny
    return bootstrap(
        lambda one, other: one.mean(axis=-1) / np.maximum(other.mean(axis=-1), tiny), above, below, unit=unit, seed=seed
    )


# Benches


@dataclass(frozen=True, kw_only=True)
class Bench(ABC):
    """Base class of every bench.  Subclasses are frozen, keyword-only dataclasses; their fields are the options.

    A field made by `option` carries its help text, which `options` lists for the command line.
    """

    name: ClassVar[str]
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    @abstractmethod
    def run(self, progress: Progress = silent) -> BenchResult:
        """Measures, and returns what was found."""

    def plot(self, result: BenchResult, path: str | Path) -> None:
        """Draws the result.  Raises ValueError if this bench has nothing to draw."""
        raise ValueError(f"the bench {self.name} draws nothing; its figures are in the JSON file")

    @classmethod
    def options(cls) -> dict[str, dict[str, Any]]:
        """Every option by name: its "type", "default" and "help"."""
        return {
            item.name: {"type": str(item.type), "default": item.default, "help": item.metadata.get("help", "")}
            for item in dataclasses.fields(cls)
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Builds the bench from plain data; text that says a number is taken as one.

        Raises ValueError for an unknown option (naming the nearest) and for values of the wrong type.
        """
        from pydantic import TypeAdapter, ValidationError

        known = cls.options()
        for key in options:
            if key not in known:
                raise ValueError(f"the bench {cls.name} has no option {key!r}; {suggest(key, known)}")
        try:
            bench: Self = TypeAdapter(cls).validate_python(dict(options))
        except ValidationError as error:
            problem = error.errors()[0]
            place = str(problem["loc"][0]) if problem["loc"] else "options"
            raise ValueError(f"{cls.name}: {place}: {problem['msg']}; got {problem['input']!r}") from None
        return bench


def option(default: Any, help: str) -> Any:
    """A field of a bench: an option with its default and what it is for."""
    return field(default=default, metadata={"help": help})


def list_benches() -> list[str]:
    """The names of all installed benches, sorted.  Imports none of them."""
    return sorted(entries("mmaccel.benches"))


def get_bench(name: str) -> type[Bench]:
    """The class of the bench called `name`.  Raises ValueError, naming the nearest, if there is none."""
    return find_class("mmaccel.benches", name, Bench)  # type: ignore[type-abstract]  # its subclasses are not


def as_list(text: str | Sequence[str]) -> list[str]:
    """The items of an option that is written with commas: "hired,random" -> ["hired", "random"]."""
    items = text.split(",") if isinstance(text, str) else list(text)
    return [item.strip() for item in items if item.strip()]
