"""`tune`: the budget at which a method meets a target on this machine."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mmaccel.api import applied
from mmaccel.flops import count_flops
from mmaccel.methods import Method, Unsupported

Quantity = Literal["seconds", "flops", "kv_bytes"]
UNITS = {"seconds": "s", "flops": "FLOP", "kv_bytes": "B"}
REPEATS = 5  # timed calls of a trial, whose median counts
EDGE = 0.1  # of a bracket: no trial lies nearer to its ends, so that each trial shrinks it


@dataclass(frozen=True)
class Trial:
    """One value of the knob, and what a call then cost."""

    knob: float
    measured: float


@dataclass(frozen=True)
class Tuned:
    """What `tune` found: the method at its best trial, and the curve that led there.

    method: to be applied as it is.  quantity, target: what was asked for.  trials: in the order they were run.
    """

    method: Method
    quantity: Quantity
    target: float
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The trial nearest to the target; the roomiest one if every trial stays below it."""
        return min(self.trials, key=lambda trial: (abs(trial.measured - self.target), -trial.knob))

    @property
    def measured(self) -> float:
        """What a call cost at the best trial, in the unit of the target."""
        return self.best.measured

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        trials = [dataclasses.asdict(trial) for trial in self.trials]
        return {
            "method": self.method.described(),
            "quantity": self.quantity,
            "target": self.target,
            "measured": self.measured,
            "trials": trials,
        }

    def plot(self, path: str | Path) -> None:
        """The curve of all trials, as a picture file."""
        from mmaccel.plots import curves

        trials = sorted(self.trials, key=lambda trial: trial.knob)
        curves(
            {self.method.name: [(trial.knob, trial.measured) for trial in trials]},
            path,
            title=f"{self.method.name}: target {self.target:.4g} {UNITS[self.quantity]}",
            x=str(self.method.knob),
            y=f"{self.quantity} of a call ({UNITS[self.quantity]})",
        )

    def __str__(self) -> str:
        unit, knob = UNITS[self.quantity], self.method.knob
        lines = [f"mmaccel tune: {self.method.name}, {self.quantity} of a call, target {self.target:.4g} {unit}"]
        for trial in sorted(self.trials, key=lambda trial: trial.knob):
            mark = "  <- chosen" if trial == self.best else ""
            lines.append(f"  {knob}={trial.knob:.4f}: {trial.measured:.4g} {unit}{mark}")
        return "\n".join(lines)


class OutOfReach(ValueError):
    """A target that no value of the knob meets.  `tuned` holds what was measured."""

    def __init__(self, message: str, tuned: Tuned) -> None:
        super().__init__(message)
        self.tuned = tuned


def tune(
    target: Any,
    method: Method,
    sample: Mapping[str, Any] | Callable[[Any], object],
    *,
    seconds: float | None = None,
    flops: float | None = None,
    kv_bytes: float | None = None,
    tolerance: float = 0.05,
    trials: int = 8,
) -> Tuned:
    """Finds the value of the method's knob (its `budget`) at which one call of the target costs what it may.

    sample: the arguments of a typical call, `target(**sample)`, which is the prefill of a language model; or a function
        that makes the call, `lambda model: model.generate(**inputs, max_new_tokens=64)`.
    seconds: wall-clock of that call, the median of 5.  flops: floating-point operations that torch counts in it.
    kv_bytes: of the caches behind it, as the report says.  Exactly one of the three.
    tolerance: how near is near enough, as a share of the target.  trials: how many values of the knob to try at most.
    Methods applied before stay on for the trials; afterwards the target is as it was.
    A target that even the whole budget does not use up gives the whole budget, which is then the only trial.
    The cost has to grow with the knob; 8 trials are enough if it grows as some power between 1 and 2.  Between the
    cheapest and the dearest trial around the target the next one is found by linear interpolation, kept off the ends of
    the bracket.
    Raises OutOfReach if the cheapest setting costs too much, Unsupported for a method without a knob or a report
    without the figure, ValueError for anything but one positive target.
    """
    quantity, wanted = _wanted({"seconds": seconds, "flops": flops, "kv_bytes": kv_bytes})
    if trials < 2:
        raise ValueError(f"a search takes at least 2 trials, the two ends of the budget; got {trials}")
    low, high = knob_range(method, target)
    call = sample if callable(sample) else lambda chosen: chosen(**sample)
    tried: list[Trial] = []

    def found() -> Tuned:
        tuned = Tuned(method, quantity, wanted, tuple(tried))
        return dataclasses.replace(tuned, method=_at(method, tuned.best.knob))

    def attempt(knob: float) -> Trial:
        with applied(target, _at(method, knob)) as run, torch.no_grad():
            tried.append(Trial(knob, _measured(quantity, lambda: call(target), run)))
        return tried[-1]

    dear = attempt(high)
    if dear.measured <= wanted:
        return found()
    cheap = attempt(low)
    if cheap.measured > wanted * (1 + tolerance):
        raise OutOfReach(
            f"{method.name} cannot reach {wanted:.4g} {UNITS[quantity]}: a call costs {cheap.measured:.4g} at "
            f"{method.knob}={low:g} and {dear.measured:.4g} at {method.knob}={high:g}; what remains is not the "
            "method's to save",
            found(),
        )
    while len(tried) < trials and abs(found().measured - wanted) > tolerance / 2 * wanted:
        trial = attempt(between(cheap, dear, wanted))
        cheap, dear = (trial, dear) if trial.measured <= wanted else (cheap, trial)
    return found()


def between(cheap: Trial, dear: Trial, wanted: float) -> float:
    """Where a straight line through two trials meets the target, but within the middle of the bracket."""
    rise = dear.measured - cheap.measured
    share = (wanted - cheap.measured) / rise if rise > 0 else 0.5
    return cheap.knob + min(max(share, EDGE), 1 - EDGE) * (dear.knob - cheap.knob)


def knob_range(method: Method, target: Any) -> tuple[float, float]:
    """The values that the method's knob may take on a target.  Raises Unsupported for a method without one."""
    if method.knob is None or method.knob not in {field.name for field in dataclasses.fields(method)}:  # type: ignore[arg-type]
        raise Unsupported(
            f"{method.name} has no single knob to tune; set its fields by hand and compare their reports, or tune a "
            "method with a budget"
        )
    return method.knob_range_on(target)


def _at(method: Method, knob: float) -> Method:
    return dataclasses.replace(method, **{str(method.knob): knob})  # type: ignore[type-var]


def _wanted(targets: Mapping[str, float | None]) -> tuple[Quantity, float]:
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"tune meets one target: seconds, flops or kv_bytes; got {', '.join(given) if given else 'none of them'}"
        )
    ((name, value),) = given.items()
    if not value > 0:
        raise ValueError(f"the target {name} is above 0; got {value!r}")
    return name, float(value)  # type: ignore[return-value]  # the names of the mapping are the quantities


def _measured(quantity: Quantity, call: Callable[[], object], run: Any) -> float:
    if quantity == "flops":
        return float(count_flops(call))
    call()
    if quantity == "kv_bytes":
        if "kv_bytes" not in run.report.quantities:
            raise Unsupported(
                "the report of this call says nothing of kv_bytes; tune seconds or flops, or make a sample that keeps "
                "a cache (use_cache=True)"
            )
        return float(run.report["kv_bytes"])
    return statistics.median(_seconds(call) for _ in range(REPEATS))


def _seconds(call: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    """For what an accelerator still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
