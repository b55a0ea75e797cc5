"""A pipeline's own first and last lines: drawing initial latents again, and decoding latents, as it does itself.

Decoding is a nested call of the pipeline that takes the last step only, in which the denoiser answers made-up numbers
and the step returns the given latents, so that what follows the loop (unpacking, scaling, VAE, post-processing) is the
pipeline's own.  Text is encoded once: the nested call is handed what the outer call's preparations returned.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from diffusion.shortcut import Way, find_shortcut, watching
from mmaccel.attachment import patched
from mmaccel.methods import Unsupported

PREPARATIONS = ("encode_prompt", "prepare_latents")
PER_SAMPLE = {"decode_timestep", "decode_noise_scale"}
"""What a pipeline's decoding wants once for every sample."""


class Tail:
    """The preparations and the decoding of one call of a pipeline.

    plain: the pipeline's `__call__`; arguments: what it was called with, by name; samples: how many it makes.
    decoding: the latents that the nested call decodes, None outside of it.
    """

    def __init__(self, pipeline: Any, plain: Callable[..., Any], arguments: dict[str, Any], samples: int) -> None:
        self.pipeline, self.plain, self.arguments, self.samples = pipeline, plain, arguments, samples
        self.decoding: Tensor | None = None
        self._originals = {name: getattr(pipeline, name) for name in PREPARATIONS if hasattr(pipeline, name)}
        self._answers: dict[str, list[Any]] = {name: [] for name in self._originals}
        self._given: dict[str, dict[str, Any]] = {}
        self._asked: dict[str, int] = {}
        self._reached = False
        self._signature = inspect.signature(plain)
        self._short: Way | None = None

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
            self._given[name] = given = dict(signature.bind(*args, **kwargs).arguments)
            if name == "prepare_latents":
                self._check_samples(given)
            answers.append(original(*args, **kwargs))
            return answers[-1]

        return remembered

    def _check_samples(self, given: dict[str, Any]) -> None:
        """Raises Unsupported where a pipeline makes another number of samples than it was asked for."""
        several = next((value for name, value in given.items() if name.endswith("_per_prompt")), 1)
        if given.get("batch_size", self.samples) * several != self.samples:
            raise Unsupported(
                f"{type(self.pipeline).__name__} was asked for {self.samples} samples and makes "
                f"{given['batch_size'] * several}: it makes one a prompt, whatever num_videos_per_prompt says. Pass a "
                "list of prompts"
            )

    def given(self, sample: Tensor) -> Tensor:
        """The latents to decode, for the step that would have made them of `sample`."""
        assert self.decoding is not None
        self._reached = True
        return self.decoding.to(sample)

    def initial(self, generator: torch.Generator, row: int, like: Tensor) -> Tensor:
        """Initial latents of one sample, as the pipeline draws them with this generator for its row `row`.

        like: all initial latents that it drew, [rows, ...].
        """
        if "prepare_latents" not in self._given:
            shape = (1, *like.shape[1:])
            return torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype)
        arguments = {
            name: value[row : row + 1] if torch.is_tensor(value) and value.ndim and len(value) == len(like) else value
            for name, value in self._given["prepare_latents"].items()
        }
        arguments |= {"generator": generator, "latents": None}
        arguments |= {name: 1 for name in arguments if name == "batch_size" or name.endswith("_per_prompt")}
        known = inspect.signature(self._originals["prepare_latents"]).parameters
        drawn = self._originals["prepare_latents"](**{name: arguments[name] for name in arguments if name in known})
        latents: Tensor = drawn if torch.is_tensor(drawn) else drawn[0]
        return latents

    def decode(self, latents: Tensor, copies: int = 1) -> Tensor:
        """Pictures in [0, 1], float32 [rows, 3, height, width] (videos: frames before 3), of clean latents.

        copies: of the latents that the pipeline's loop works on.
        """
        if self._short is not None:
            return self._short(latents)
        vae = getattr(self.pipeline, "vae", None)
        if vae is None or getattr(self.pipeline, "safety_checker", None) is not None:  # which looks at each picture
            return self._nested(torch.cat([latents] * copies))
        with watching(vae) as watched:
            pictures = self._nested(torch.cat([latents] * copies))
        self._short = find_shortcut(vae, watched, latents, pictures)
        return pictures

    def _nested(self, latents: Tensor) -> Tensor:
        arguments = {name: value for name, value in self.arguments.items() if not name.startswith("callback")}
        alike = [torch.Generator() for _ in range(max(len(latents), self.samples))]  # whatever is drawn, for each row
        arguments |= {"output_type": "pt", "return_dict": True, "generator": alike}
        for name in PER_SAMPLE & self._signature.parameters.keys():
            value = arguments.get(name, self._signature.parameters[name].default)
            values = set(value) if isinstance(value, list) else {value}
            if len(values) > 1:
                raise Unsupported(f"{name} differs between samples, {value}; a search needs one for all")
            arguments[name] = None if values == {None} else [*values] * len(latents)
        self._asked, self._reached, self.decoding = {}, False, latents
        try:
            with _kept(self.pipeline), _kept(self.pipeline.scheduler):
                if "strength" not in self._signature.parameters:  # which leaves out the first steps
                    vars(self.pipeline.scheduler)["set_timesteps"] = self._last_time()
                vars(self.pipeline)["_progress_bar_config"] = {"disable": True}
                pictures = self.plain(self.pipeline, **arguments)[0]
        finally:
            self.decoding = None
        if not self._reached:
            raise Unsupported(
                f"{type(self.pipeline).__name__} took no step when asked for its last only, so that it decodes nothing "
                "of a search's; leave off what shortens its schedule (denoising_end)"
            )
        return torch.as_tensor(pictures).float()

    def _last_time(self) -> Callable[..., None]:
        """What stands for `set_timesteps` where one step is enough: all times but the last are left out."""
        scheduler = self.pipeline.scheduler

        @functools.wraps(scheduler.set_timesteps)
        def last_time(*args: Any, **kwargs: Any) -> None:
            scheduler.timesteps = scheduler.timesteps[-1:]

        return last_time


@contextmanager
def _kept(owner: Any) -> Iterator[None]:
    """The instance's attributes are after the block what they were before."""
    before = dict(vars(owner))
    try:
        yield
    finally:
        vars(owner).clear()
        vars(owner).update(before)
