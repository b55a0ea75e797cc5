"""How fast, and how large: dense, decorated and oracle, interleaved in one run, on random weights."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mmaccel
from mmaccel.bench import Figure, Progress, Samples, interleave, median, median_ratio, silent, timed
from mmaccel.methods import Method, Unsupported
from vision_tokens.answering import Clock
from vision_tokens.attention_rows import BLOCK, attention_rows
from vision_tokens.bench_settings import has_oracle
from vision_tokens.bench_shapes import Shape
from vision_tokens.families import Host, find_host
from vision_tokens.oracle import Oracle, Read, read_by, twin
from vision_tokens.visual_method import VisualMethod

Generate = Callable[..., Any]
"""Generates from the bench's prompt; takes the options of `generate`."""


def first_token(generate: Generate, wait: Callable[[], object]) -> dict[str, float]:
    """Seconds from the call to the first token, the image encoder included."""
    clock = Clock()
    wait()
    start = time.perf_counter()
    generate(max_new_tokens=1, do_sample=False, streamer=clock)
    return {"ttft": clock.times[0] - start}


def further_tokens(generate: Generate, tokens: int) -> dict[str, float]:
    """Seconds from the first to the last of so many new tokens, greedily chosen, and those of the whole answer."""
    clock, start = Clock(), time.perf_counter()
    generate(max_new_tokens=tokens, do_sample=False, streamer=clock)
    return {"decode": clock.times[-1] - clock.times[0], "answer": clock.times[-1] - start}


def peak_memory(generate: Generate, device: str) -> tuple[int, int]:
    """Bytes: the largest sum of live tensors of one prefill, beyond those that lived before; the cache it leaves.

    On a CPU from the profiler's record of every allocation, on a GPU from its allocator.  Both count tensors, so the
    figure is the same on every machine; weights are not in it.
    """
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        cache = generate(**options).past_key_values
        return torch.cuda.max_memory_allocated(device) - before, kv_bytes(cache)
    gc.collect()  # what earlier runs left would be freed in this one, and count against it
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler greets on stderr otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        cache = generate(**options).past_key_values
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most, kv_bytes(cache)


def kv_bytes(cache: Any) -> int:
    """Bytes of a cache's keys and values."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def runs_of(
    model: Any, inputs: Mapping[str, Tensor], settings: Mapping[str, Sequence[Method]]
) -> tuple[dict[str, Generate], dict[str, Softmaxes]]:
    """The plain model; by setting a decorated twin and, if it has one, its oracle ("hired", "hired oracle").

    And by setting what ranking by all rows needs at least, where a method does.
    """
    runs: dict[str, Generate] = {"dense": partial(model.generate, **inputs)}
    rankings: dict[str, Softmaxes] = {}
    for name, methods in settings.items():
        decorated = mmaccel.apply(twin(model), *methods)
        runs[name] = partial(decorated.generate, **inputs)
        if has_oracle(methods):
            read = read_by(decorated, inputs)
            runs[f"{name} oracle"] = partial(Oracle(model, read).generate, inputs)
            if any(isinstance(method, VisualMethod) and method.ranks_by_all for method in methods):
                rankings[name] = Softmaxes(find_host(model), read)
    return runs, rankings


class Softmaxes:
    """One softmax(q k^T) of every layer behind which tokens go, its columns summed: the least that ranks by all rows.

    In causal blocks, on random queries and keys of as many tokens, heads and numbers as the layers have.
    """

    def __init__(self, host: Host, read: Read) -> None:
        config: Any = host.text.config
        batch, held = read.embeddings.shape[:2]
        numbers = range(len(host.decoder_layers))
        widths = [read.layers[layer].shape[1] if layer in read.layers else held for layer in numbers]
        behind = [*widths[1:], widths[-1]]
        self.widths = [widths[layer] for layer in numbers if layer in read.caches or behind[layer] < widths[layer]]
        heads = config.num_attention_heads
        shape = batch, heads, held, config.hidden_size // heads
        self.query, self.key = torch.randn(2, *shape).to(read.embeddings)

    def __call__(self) -> None:
        for width in self.widths:
            for start in range(0, width, BLOCK):
                stop = min(start + BLOCK, width)
                rows, columns = self.query[:, :, start:stop], self.key[:, :, :stop]
                attention_rows(rows, columns, rows.shape[-1] ** -0.5).sum(dim=2)


def measure_speed(
    name: str,
    shape: Shape,
    settings: Mapping[str, Sequence[Method]],
    *,
    tokens: int = 64,
    batch: int = 1,
    rounds: int = 15,
    decode_rounds: int = 5,
    device: str = "cpu",
    progress: Progress = silent,
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """Figures and rows of one shape; figures are named `quantity.shape.run`.  batch: rows of a run, all alike.

    Times to the first token and of decoding are taken in rounds of their own: the former are short, vary more, and
    deserve more rounds.
    """
    model, inputs = shape.build(device), shape.inputs(device, rows=batch)
    wait = _waiting(device)
    with torch.inference_mode():
        runs, rankings = runs_of(model, inputs, settings)
        sizes = {run: peak_memory(generate, device) for run, generate in runs.items()}
        first: dict[str, Callable[[], dict[str, float]]] = {}
        first |= {run: partial(first_token, generate, wait) for run, generate in runs.items()}
        first |= {f"{name} ranking": timed(rank, wait) for name, rank in rankings.items()}
        further = {run: partial(further_tokens, generate, tokens) for run, generate in runs.items()}
        found = interleave(first, rounds, progress=_named(f"{name}: first token,", progress))
        decoded = interleave(further, decode_rounds, progress=_named(f"{name}: {tokens} tokens,", progress))
    for run, quantities in decoded.items():
        found[run] |= quantities
    figures: dict[str, Figure] = {}
    for run, (peak, cache) in sizes.items():
        figures[f"ttft.{name}.{run}"] = median(found[run]["ttft"], "s")
        figures[f"tokens_per_second.{name}.{run}"] = median(batch * (tokens - 1) / found[run]["decode"], "tokens/s")
        figures[f"answer.{name}.{run}"] = median(found[run]["answer"], "s")
        figures[f"peak_memory.{name}.{run}"] = Figure(peak, unit="B")
        figures[f"kv_bytes.{name}.{run}"] = Figure(cache, unit="B")
    for setting in settings:
        figures |= _ratios(name, setting, found)
    rows = [
        {
            "part": "speed",
            "shape": name,
            "summary": shape.summary,
            "run": run,
            "ttft_seconds": figures[f"ttft.{name}.{run}"].value,
            "tokens_per_second": figures[f"tokens_per_second.{name}.{run}"].value,
            "peak_memory_bytes": peak,
            "kv_bytes": cache,
            "rounds": {quantity: values.tolist() for quantity, values in found[run].items()},
        }
        for run, (peak, cache) in sizes.items()
    ]
    return figures, rows


def measure_first_tokens(
    name: str,
    shape: Shape,
    settings: Mapping[str, Sequence[Method]],
    rounds: int = 15,
    device: str = "cpu",
    progress: Progress = silent,
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """`ttft.shape.run` of the plain model and of every setting that this shape can have, and their rows."""
    model, inputs = shape.build(device), shape.inputs(device)
    wait = _waiting(device)
    runs: dict[str, Generate] = {"dense": partial(model.generate, **inputs)}
    rows: list[dict[str, Any]] = []
    for setting, methods in settings.items():
        try:
            runs[setting] = partial(mmaccel.apply(twin(model), *methods).generate, **inputs)
        except Unsupported as reason:
            rows.append({"part": "refused", "method": setting, "shape": name, "reason": str(reason)})
    with torch.inference_mode():
        first = {run: partial(first_token, generate, wait) for run, generate in runs.items()}
        found = interleave(first, rounds, progress=_named(f"{name}: first token,", progress))
    figures = {f"ttft.{name}.{run}": median(quantities["ttft"], "s") for run, quantities in found.items()}
    for run, quantities in found.items():
        seconds = figures[f"ttft.{name}.{run}"].value
        row = {"part": "first token", "shape": name, "run": run, "ttft_seconds": seconds}
        rows.append({**row, "rounds": {"ttft": quantities["ttft"].tolist()}})
    return figures, rows


def _ratios(name: str, setting: str, found: Mapping[str, Mapping[str, Samples]]) -> dict[str, Figure]:
    """Against the oracle (1 is the limit), how many times faster than dense, and than HiRED alone."""
    figures: dict[str, Figure] = {}
    ours, oracle, hired = found[setting], found.get(f"{setting} oracle"), found.get("hired")
    if (ranking := found.get(f"{setting} ranking")) is not None:
        assert oracle is not None
        left = ours["ttft"] - np.median(ranking["seconds"])
        figures[f"ttft_ranked_ratio.{name}.{setting}"] = median_ratio(left, oracle["ttft"])
    for quantity in ("ttft", "decode", "answer"):
        figures[f"{quantity}_speedup.{name}.{setting}"] = median_ratio(found["dense"][quantity], ours[quantity])
        if hired is not None and hired is not ours:
            figures[f"{quantity}_over_hired.{name}.{setting}"] = median_ratio(hired[quantity], ours[quantity])
        if oracle is not None:
            figures[f"{quantity}_oracle_ratio.{name}.{setting}"] = median_ratio(ours[quantity], oracle[quantity])
            limit = median_ratio(found["dense"][quantity], oracle[quantity])
            figures[f"{quantity}_speedup_limit.{name}.{setting}"] = limit
    return figures


def _named(what: str, progress: Progress) -> Progress:
    return lambda run, done, total: progress(f"{what} {run}", done, total)


def _waiting(device: str) -> Callable[[], object]:
    """What waits for a GPU to finish; a CPU has nothing to wait for."""
    return partial(torch.cuda.synchronize, device) if torch.device(device).type == "cuda" else lambda: None
