"""A pipeline's own first and last lines: drawing initial latents again, and decoding latents, as it does itself.

Decoding is a nested call of the pipeline whose denoiser answers made-up numbers and whose every step returns the given
latents, so that what follows the loop (unpacking, scaling, VAE, post-processing) is the pipeline's own.  Text is
encoded once: the nested call is handed what the outer call's preparations returned.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from mmaccel.attachment import patched

PREPARATIONS = ("encode_prompt", "prepare_latents")


class Tail:
    """The preparations and the decoding of one call of a pipeline.

    plain: the pipeline's `__call__`; arguments: what it was called with, by name.
    decoding: the latents that the nested call decodes, None outside of it.
    """

    def __init__(self, pipeline: Any, plain: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self.pipeline, self.plain, self.arguments = pipeline, plain, arguments
        self.decoding: Tensor | None = None
        self._originals = {name: getattr(pipeline, name) for name in PREPARATIONS if hasattr(pipeline, name)}
        self._answers: dict[str, list[Any]] = {name: [] for name in self._originals}
        self._given: dict[str, dict[str, Any]] = {}
        self._asked: dict[str, int] = {}

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Remembers what the pipeline's preparations are given and return, for the length of the block."""
        with ExitStack() as undo:
            for name in self._originals:
                undo.enter_context(patched(self.pipeline, name, self._remembered(name)))
            yield

    def _remembered(self, name: str) -> Callable[..., Any]:
        original, answers = self._originals[name], self._answers[name]
        signature = inspect.signature(original)

        @functools.wraps(original)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            if self.decoding is not None:
                self._asked[name] = self._asked.get(name, 0) + 1
                return answers[self._asked[name] - 1]
            self._given[name] = dict(signature.bind(*args, **kwargs).arguments)
            answers.append(original(*args, **kwargs))
            return answers[-1]

        return remembered

    def initial(self, generator: torch.Generator, like: Tensor) -> Tensor:
        """Initial latents of one sample, as the pipeline draws them with this generator; `like` one of its own."""
        if "prepare_latents" not in self._given:
            return torch.randn(like.shape, generator=generator, device=generator.device)
        arguments = {**self._given["prepare_latents"], "generator": generator, "latents": None}
        known = inspect.signature(self._originals["prepare_latents"]).parameters
        if "batch_size" in arguments:
            arguments["batch_size"] = 1
        drawn = self._originals["prepare_latents"](**{name: arguments[name] for name in arguments if name in known})
        latents: Tensor = drawn if torch.is_tensor(drawn) else drawn[0]
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [0, 1], float32 [rows, 3, height, width] (videos: frames before 3), of clean latents."""
        arguments = {name: value for name, value in self.arguments.items() if not name.startswith("callback")}
        arguments |= {"output_type": "pt", "return_dict": True, "generator": torch.Generator()}
        arguments |= {name: None for name in ("timesteps", "sigmas") if arguments.get(name) is not None}
        if "strength" not in inspect.signature(self.plain).parameters:  # which leaves out the first steps
            arguments["num_inference_steps"] = 1
        self._asked, self.decoding = {}, latents
        try:
            with _kept(self.pipeline), _kept(self.pipeline.scheduler):
                vars(self.pipeline)["_progress_bar_config"] = {"disable": True}
                pictures = self.plain(self.pipeline, **arguments)[0]
        finally:
            self.decoding = None
        return torch.as_tensor(pictures).float()


@contextmanager
def _kept(owner: Any) -> Iterator[None]:
    """The instance's attributes are after the block what they were before."""
    before = dict(vars(owner))
    try:
        yield
    finally:
        vars(owner).clear()
        vars(owner).update(before)
