"""What one call of a decorated target did: counted, timed, and compared with the undecorated target."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Lazy = float | int | Callable[[], float | int]


@dataclass
class Quantity:
    """One figure of a report: what it is, beside what it would be without the methods.

    A figure that costs time to count (FLOPs) is a function, called once, when somebody reads it.
    """

    value: Lazy
    dense: Lazy | None
    unit: str

    def read(self) -> tuple[float | int, float | int | None]:
        """The figure and its dense twin, counted now if they were not yet."""
        if callable(self.value):
            self.value = self.value()
        if callable(self.dense):
            self.dense = self.dense()
        return self.value, self.dense


@dataclass
class Report:
    """One call: its methods, its quantities by name, seconds by phase, and details that a method wants to show."""

    methods: tuple[dict[str, Any], ...]
    quantities: dict[str, Quantity] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """Plain data that is no single figure: lists, tables."""

    def record(self, name: str, value: Lazy, dense: Lazy | None = None, unit: str = "") -> None:
        """Sets the quantity `name`."""
        self.quantities[name] = Quantity(value, dense, unit)

    def __getitem__(self, name: str) -> float | int:
        """The figure called `name`.  Raises KeyError that lists the figures there are."""
        if name not in self.quantities:
            raise KeyError(f"this report has no figure {name!r}; it has {', '.join(self.quantities)}")
        return self.quantities[name].read()[0]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the wall-clock seconds of the block to the phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def to_dict(self, flops: bool = True) -> dict[str, Any]:
        """The report as plain data: every quantity under its name, its dense twin under `name_dense`.

        flops: whether FLOPs, which take as long to count as to compute, are among them.
        """
        data: dict[str, Any] = {"methods": list(self.methods), "seconds": dict(self.seconds)}
        for name, quantity in self.quantities.items():
            if quantity.unit == "FLOP" and not flops:
                continue
            value, dense = quantity.read()
            data[name] = value
            if dense is not None:
                data[f"{name}_dense"] = dense
        return {**data, **self.facts}

    def __str__(self) -> str:
        names = " + ".join(method["method"] for method in self.methods)
        lines = [f"mmaccel report: {names}"]
        for name, quantity in self.quantities.items():
            value, dense = quantity.read()
            change = f"{figure(dense)} -> {figure(value)}" if dense is not None else figure(value)
            lines.append(f"  {name.replace('_', ' ')}: {change} {quantity.unit}".rstrip())
        lines += [f"  {phase}: {seconds * 1e3:.1f} ms" for phase, seconds in self.seconds.items()]
        return "\n".join(lines)


def figure(value: float | int) -> str:
    """A number as people read it: 147456 as it is, 8.3e12 as "8.3 T"."""
    if isinstance(value, int) and value < 1_000_000:
        return str(value)
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"
