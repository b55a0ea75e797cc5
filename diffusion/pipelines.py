"""Attaching a search to a diffusers pipeline, without forking one: `pipe(...)` runs the pipeline's own code."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

from diffusion.checks import check_search
from diffusion.denoiser import DENOISERS
from diffusion.rewards.base import as_reward
from diffusion.runs import PlainRun, SearchRun
from diffusion.search import Search
from mmaccel.attachment import Attachment, attached
from mmaccel.methods import Unsupported

_SLOT = "_mmaccel_search"


def decorate(search: Search, pipeline: Any, attachment: Attachment) -> None:
    """Makes `pipeline(...)` run the search.  Raises Unsupported for what is no pipeline with a scheduler's loop."""
    from diffusers import DiffusionPipeline

    if not isinstance(pipeline, DiffusionPipeline):
        raise Unsupported(
            f"{search.name} decorates diffusers pipelines; got {type(pipeline).__name__}. Apply it to the pipeline, "
            "not to one of its models"
        )
    scheduler = getattr(pipeline, "scheduler", None)
    if not hasattr(scheduler, "step") or not any(getattr(pipeline, name, None) is not None for name in DENOISERS):
        raise Unsupported(
            f"{type(pipeline).__name__} has no scheduler with `step` and no denoiser called {', '.join(DENOISERS)}; "
            f"{search.name} needs both"
        )
    check_search(search, scheduler)
    as_reward(search.reward)
    plain = type(pipeline)
    runner = Runner(search, plain.__call__, attachment)

    @functools.wraps(plain.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return runner(self, *args, **kwargs) if self is pipeline else plain.__call__(self, *args, **kwargs)

    names = {"__call__": call, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    attachment.swap_class(pipeline, type(plain.__name__, (plain,), names))
    attachment.set_attribute(pipeline, _SLOT, runner)


def stop(pipeline: Any) -> None:
    """Ends the search that runs in this pipeline; its call returns the best sample found so far.

    May be called from another thread, a callback or a signal handler; does nothing if no search runs.
    Raises ValueError if the pipeline is not decorated with one.
    """
    runner = vars(pipeline).get(_SLOT) if attached(pipeline) else None
    if not isinstance(runner, Runner):
        raise ValueError(f"no search is applied to this {type(pipeline).__name__}; there is nothing to stop")
    runner.stopped.set()


class Runner:
    """What a decorated pipeline's call does.  One run at a time: a search has its pipeline for itself."""

    def __init__(self, search: Search, plain: Callable[..., Any], attachment: Attachment) -> None:
        self.search, self.plain, self.attachment = search, plain, attachment
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.thread: int | None = None

    def __call__(self, pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        if self.thread == threading.get_ident():
            raise RuntimeError(
                f"a search runs in this {type(pipeline).__name__}, and its reward or a callback calls the pipeline "
                "again; give it a pipeline of its own"
            )
        with self.lock:
            self.thread = threading.get_ident()
            try:
                return self._run(pipeline, self._by_name(pipeline, args, kwargs))
            finally:
                self.thread = None

    def _run(self, pipeline: Any, arguments: dict[str, Any]) -> Any:
        self.stopped.clear()
        report = self.attachment.start_report()
        kind = SearchRun if self.search.chooses else PlainRun
        run = kind(self.search, pipeline, self.plain, arguments, self.stopped, report)
        try:
            return run()
        finally:
            run.fill()

    def _by_name(self, pipeline: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name, without the pipeline itself."""
        signature = inspect.signature(self.plain)
        arguments = dict(signature.bind(pipeline, *args, **kwargs).arguments)
        arguments.pop(next(iter(signature.parameters)))
        return {**arguments, **arguments.pop("kwargs", {})}
