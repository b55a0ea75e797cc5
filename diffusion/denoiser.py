"""The denoiser tap: learns from a pipeline how it calls its denoiser, and calls it again with other latents and times.

While a search runs, the pipeline's own loop is a skeleton: its calls are recorded and answered with made-up numbers,
at no cost.  The search replays the recorded call with its own latents, a particle a row; what belongs to a row of the
batch is repeated by a table of names.  An input that is in no table, or that changes from step to step, is refused by
name.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmaccel.methods import Unsupported

DENOISERS = ("unet", "transformer", "transformer_2")
LATENTS = ("sample", "hidden_states")
PER_ROW = {
    "attention_mask",
    "class_labels",
    "encoder_attention_mask",
    "encoder_hidden_states",
    "encoder_hidden_states_mask",
    "guidance",
    "img_shapes",
    "pooled_projections",
    "resolution",
    "aspect_ratio",
    "text_embeds",
    "time_ids",
    "timestep_cond",
    "txt_seq_lens",
}
SHARED = {"image_rotary_emb", "img_ids", "txt_ids", "rope_interpolation_scale"}
REFUSED = {
    "block_controlnet_hidden_states": "ControlNet",
    "controlnet_block_samples": "ControlNet",
    "controlnet_single_block_samples": "ControlNet",
    "controlnet_blocks_repeat": "ControlNet",
    "down_block_additional_residuals": "ControlNet",
    "mid_block_additional_residual": "ControlNet",
    "down_intrablock_additional_residuals": "T2I-Adapter",
    "image_embeds": "IP-Adapter",
    "image_hint": "ControlNet",
    "ip_adapter_image_embeds": "IP-Adapter",
    "ip_adapter_masks": "IP-Adapter",
    "encoder_hidden_states_image": "image conditioning",
}


@dataclass(frozen=True)
class Call:
    """One call of a denoiser, by name of its inputs; `output` is what it was answered."""

    denoiser: str
    inputs: Mapping[str, Any]
    output: Tensor

    @property
    def latents(self) -> str:
        """The name of the input that holds the latents."""
        return next(name for name in LATENTS if name in self.inputs)

    def passes(self, rows: int) -> int:
        """How often each of the pipeline's rows stands in this call: 2 where guidance doubles the batch."""
        return len(self.inputs[self.latents]) // rows


class DenoiserTap:
    """What stands in front of a pipeline's denoisers during one run.

    networks: the denoisers by their name in the pipeline.  calls: those since the last `take`.
    It answers the thread that made it, and only while it listens: for all others (a reward that uses the same network,
    another pipeline in another thread) the denoisers are what they were.
    """

    def __init__(self, pipeline: Any) -> None:
        self.networks: dict[str, Callable[..., Any]] = {}
        self.calls: list[Call] = []
        self._signatures: dict[str, inspect.Signature] = {}
        self._pipeline = pipeline
        self._thread = threading.get_ident()
        self._listens = True

    @contextmanager
    def listening(self, listens: bool) -> Iterator[None]:
        """Whether the pipeline's calls are recorded and answered, for the length of the block."""
        before, self._listens = self._listens, listens
        try:
            yield
        finally:
            self._listens = before

    def patches(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        """(owner, attribute, replacement) for every denoiser of the pipeline."""
        found = []
        for name in DENOISERS:
            module = getattr(self._pipeline, name, None)
            if not isinstance(module, nn.Module):
                continue
            # a module that was compiled in place never comes to its forward
            entry = "_compiled_call_impl" if getattr(module, "_compiled_call_impl", None) else "forward"
            original = getattr(module, entry)
            self.networks[name] = original
            plain = getattr(module, "_orig_mod", module)
            self._signatures[name] = inspect.signature(type(plain).forward)
            found.append((module, entry, self._answer(name, module, original)))
        return found

    def take(self) -> list[Call]:
        """The calls since the last time, and forgets them."""
        calls, self.calls = self.calls, []
        return calls

    def _answer(self, name: str, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def answer(*args: Any, **kwargs: Any) -> Any:
            if not self._listens or threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            inputs = dict(self._signatures[name].bind(module, *args, **kwargs).arguments)
            inputs.pop("self", None)
            inputs.update(inputs.pop("kwargs", {}))
            latents = inputs[next(key for key in LATENTS if key in inputs)]
            output = made_up(latents, module, len(self.calls))
            self.calls.append(Call(name, inputs, output))
            return (output,) if inputs.get("return_dict") is False else _Output(sample=output)

        return answer


class _Output(dict[str, Tensor]):
    """What a denoiser returns: `.sample`, or the first entry."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__("sample" if key == 0 else key)


def made_up(latents: Tensor, module: nn.Module, number: int) -> Tensor:
    """Normal numbers in the shape of a denoiser's output; twice the channels where it also learns a variance."""
    config: Any = getattr(getattr(module, "_orig_mod", module), "config", {})
    shape = list(latents.shape)
    if config.get("out_channels") == 2 * (config.get("in_channels") or -1):
        shape[1] *= 2
    generator = torch.Generator().manual_seed(number)
    return torch.randn(shape, generator=generator).to(latents)


def check_inputs(calls: Sequence[Call], rows: int) -> None:
    """Raises Unsupported if a call holds an input that cannot be replayed for other latents."""
    for call in calls:
        for name, value in _leaves(call.inputs):
            if name == call.latents or name == "timestep" or value is None:
                continue
            if name in REFUSED and _tensors(value):
                raise Unsupported(
                    f"the denoiser is given {name!r} ({REFUSED[name]}), which belongs to one trajectory; a search "
                    "replays the denoiser for many, so leave it off"
                )
            if name not in PER_ROW | SHARED and _tensors(value):
                raise Unsupported(
                    f"the denoiser is given {name!r}, which this search does not know how to repeat for several "
                    f"samples; known inputs are {', '.join(sorted(PER_ROW | SHARED))}"
                )
        count = len(call.inputs[call.latents])
        if count % rows:
            raise Unsupported(f"a denoiser call of {count} rows for {rows} samples cannot be told apart by sample")


def same_inputs(before: Sequence[Call], now: Sequence[Call]) -> None:
    """Raises Unsupported if the calls of two steps differ in more than latents and time, naming the input."""
    if len(before) != len(now):
        raise Unsupported(
            f"the pipeline called its denoiser {len(before)} times in its first step and {len(now)} times in a later "
            "one (guidance for some steps only?); a search needs every step to be alike"
        )
    for first, second in zip(before, now, strict=True):
        ours, theirs = dict(_leaves(first.inputs)), dict(_leaves(second.inputs))
        for name in ours.keys() | theirs.keys():
            if name in (first.latents, "timestep"):
                continue
            if not _same(ours.get(name), theirs.get(name)):
                raise Unsupported(
                    f"the denoiser's input {name!r} changes between steps; a search replays the first step's"
                )


TOLD: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda time: time,
    lambda time: time / 1000,
    lambda time: 1 - time / 1000,
)
"""What pipelines tell their denoisers of the scheduler's time."""


def told_at(calls: Sequence[Call], time: Any) -> Callable[[Tensor], Tensor]:
    """Which of the known ways leads from the scheduler's time to what the calls were told, the same for every row.

    Raises Unsupported if none does.
    """
    given = [torch.as_tensor(call.inputs["timestep"]) for call in calls]
    for told in TOLD:
        expected = [told(torch.as_tensor(time).flatten()[0].to(value)) for value in given]
        if all(torch.allclose(*pair, rtol=1e-2, atol=1e-6) for pair in zip(given, expected, strict=True)):
            return told
    raise Unsupported(
        f"at the scheduler's time {float(time):g} the denoiser was told {given[0].flatten()[:4].tolist()}; a search "
        "knows time, time / 1000 and 1 - time / 1000, the same for the whole sample"
    )


def replayed(
    call: Call, row: int, rows: int, latents: Tensor, times: Tensor, told: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """The call's inputs for `latents`, [particles, ...], of the pipeline's row `row` of `rows`.

    times: the scheduler's, float64, [particles]; the denoiser is told them in the dtype and form that it was before.
    """
    passes, count = call.passes(rows), len(latents)
    inputs = _repeated(dict(call.inputs), row, rows, passes, count)
    given = call.inputs[call.latents]
    inputs[call.latents] = torch.cat([latents.to(given)] * passes)
    form = torch.as_tensor(call.inputs["timestep"])
    whole = form.is_floating_point() or bool((times == times.round()).all())
    times = told(times.to(form.device, form.dtype if whole else torch.float32))
    if form.ndim == 0 and bool((times == times[0]).all()):
        inputs["timestep"] = times[0]
    else:
        each = times.repeat(passes).reshape(-1, *(1 for _ in form.shape[1:]))
        inputs["timestep"] = each.expand(-1, *form.shape[1:])
    return inputs


def _repeated(inputs: Mapping[str, Any], row: int, rows: int, passes: int, count: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            made[name] = _repeated(value, row, rows, passes, count)
        elif name not in PER_ROW or value is None:
            made[name] = value
        elif torch.is_tensor(value):
            mine = value.reshape(passes, rows, -1, *value.shape[1:])[:, row]  # [passes, entries a sample, ...]
            made[name] = mine[:, None].expand(-1, count, *mine.shape[1:]).flatten(0, 2)
        else:
            share = len(value) // passes if len(value) % (passes * rows) == 0 else len(value)  # of one pass
            chosen = [value[first + row * share // rows] for first in range(0, len(value), share)]
            made[name] = [entry for entry in chosen for _ in range(count)]
    return made


def _leaves(inputs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The inputs by name, with those of dictionaries among them in their place."""
    found: list[tuple[str, Any]] = []
    for name, value in inputs.items():
        found += _leaves(value) if isinstance(value, dict) else [(name, value)]
    return found


def _tensors(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_tensors(entry) for entry in value)
    return torch.is_tensor(value)


def _same(first: Any, second: Any) -> bool:
    if torch.is_tensor(first) and torch.is_tensor(second):
        return first is second or torch.equal(first, second)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)
