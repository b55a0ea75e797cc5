"""The plots of reports and benches.  matplotlib is imported when something is drawn, and only then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

# Okabe and Ito's palette, which readers with any common colour blindness can tell apart; each curve has its marker, too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
MOST_TICKS = 8  # one for each cost that was measured, where they have room


@dataclass(frozen=True)
class Point:
    """One setting of a method: what it costs, how good it is, and the interval of the latter."""

    cost: float
    quality: float
    low: float
    high: float


def pareto(
    curves: Mapping[str, Sequence[Point]],
    path: str | Path,
    *,
    title: str,
    cost: str,
    quality: str,
    reference: float | None = None,
) -> None:
    """Quality against cost, a curve a method with its intervals, as a picture file of the type that `path` ends in.

    cost, quality: the axes' names with their units.  reference: the quality of the undecorated model, a dashed line.
    Raises ValueError if there is nothing to draw, ImportError that names the extra if matplotlib is missing.
    """
    if not any(curves.values()):
        raise ValueError("there is nothing to draw: a Pareto plot needs at least one point")
    figure, axes = _figure(7, 4.5)
    for place, (name, points) in enumerate(curves.items()):
        points = sorted(points, key=lambda point: point.cost)
        errors = [[point.quality - point.low for point in points], [point.high - point.quality for point in points]]
        axes.errorbar(
            [point.cost for point in points],
            [point.quality for point in points],
            yerr=errors,
            label=name,
            **_look(place),
            markersize=5,
            linewidth=1.5,
            capsize=2.5,
        )
    if reference is not None:
        axes.axhline(reference, color="#666666", linestyle="--", linewidth=1, label="dense")
    axes.set_xscale("log")
    costs = sorted({point.cost for points in curves.values() for point in points})
    if len(costs) <= MOST_TICKS:
        axes.set_xticks(costs, [f"{value:g}" for value in costs])
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    _save(figure, axes, path, title=title, xlabel=cost, ylabel=quality)


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path | IO[bytes],
    *,
    title: str,
    x: str,
    y: str,
    steps: bool = False,
) -> None:
    """Curves through points (x, y), as a picture file of the type that `path` ends in; an open file gets a PNG.

    x, y: the axes' names with their units.  steps: a curve keeps its value up to the next point.
    Raises ValueError if there is nothing to draw, ImportError that names the extra if matplotlib is missing.
    """
    if not any(lines.values()):
        raise ValueError("there is nothing to draw: a curve needs at least one point")
    figure, axes = _figure(5, 3.4)  # so that a narrow page keeps its letters legible
    for place, (name, points) in enumerate(lines.items()):
        axes.plot(
            [point[0] for point in points],
            [point[1] for point in points],
            label=name,
            **_look(place),
            markersize=3,
            drawstyle="steps-post" if steps else "default",
        )
    _save(figure, axes, path, title=title, xlabel=x, ylabel=y)


def _look(place: int) -> dict[str, str]:
    """Colour and marker of a curve by its place; when all were used, they come again with dashed lines."""
    turn, kind = divmod(place, len(COLOURS))
    return {"color": COLOURS[kind], "marker": MARKERS[kind], "linestyle": "--" if turn else "-"}


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of its own, in inches, with no window and no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib, which is not installed; pip install 'mmaccel[plots]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, axes: Any, path: str | Path | IO[bytes], **labels: str) -> None:
    axes.set(**labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
