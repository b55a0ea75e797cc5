"""How long a policy takes to answer: dense, decorated and oracle, taking turns, one row each.

A method that remembers earlier steps is timed with them: every policy goes through the same episodes.  The steps
in which it works on all tokens count like all others; the rows say how many they were.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

import mmaccel
from mmaccel.attachment import attached
from mmaccel.bench import Figure, Progress, Samples, bootstrap, interleave, median, median_ratio, silent
from mmaccel.bench_rows import Row
from mmaccel.pocket.world import HELD_OUT_SEEDS
from mmaccel.registry import suggest
from robotics.action_tokens import ActionBins, ActionTokenPolicy
from robotics.bench_settings import Setting
from robotics.control import Controller
from robotics.observations import Observation
from robotics.pocket import CAMERA, load, look
from robotics.world import PushWorld
from vision_tokens.bench_shapes import SHAPES
from vision_tokens.families import find_host
from vision_tokens.oracle import Oracle, read_by, twin

ACTION_TOKENS = 7  # of an answer on the shapes with random weights, as OpenVLA's
STEPS = 12  # of an episode there


def stand_in(shape: str, device: str) -> tuple[ActionTokenPolicy, list[list[Observation]]]:
    """A policy with random weights, and episodes of random pictures: time depends on shapes alone."""
    if shape not in SHAPES:
        raise ValueError(f"there is no shape {shape!r}; {suggest(shape, ['pocket', *SHAPES])}")
    chosen = SHAPES[shape]
    if chosen.tiles:
        raise ValueError(f"policies read one picture a camera, and the shape {shape} cuts it into tiles; take A or A7")
    inputs = chosen.inputs(device)

    def prepare(observation: Observation) -> dict[str, Any]:
        return {**inputs, "pixel_values": observation.images[CAMERA].to(device, chosen.dtype)}

    policy = ActionTokenPolicy(
        chosen.build(device),
        prepare,
        cameras=(CAMERA,),
        dims=ACTION_TOKENS,
        bins=ActionBins(chosen.vocabulary),
    )
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(STEPS, 1, 3, chosen.pixels, chosen.pixels, generator=generator)
    return policy, [[Observation({CAMERA: picture}, None, ["move"]) for picture in pictures]]


def recorded(policy: ActionTokenPolicy, episodes: int) -> list[list[Observation]]:
    """What the policy sees, each time that it is asked, in its own held-out episodes."""
    found = []
    for seed in HELD_OUT_SEEDS[:episodes]:
        world, control, seen, over = PushWorld(), Controller(policy), [], False
        world.reset(seed=seed)
        control.reset()
        while not over:
            observation, calls = look([world], [0]), control.calls
            action = control.step(observation)[0].double().numpy()
            seen += [observation] if control.calls > calls else []
            _, _, success, late, _ = world.step(action)
            over = success or late
        found.append(seen)
    return found


def with_model(policy: ActionTokenPolicy, model: Any) -> ActionTokenPolicy:
    """The same policy around another model of the same kind."""
    other = copy.copy(policy)
    other.model, other.host = model, find_host(model)
    return other


class Turns:
    """A policy that answers one observation a turn, episode after episode, and says how long it took."""

    def __init__(
        self, policy: ActionTokenPolicy, episodes: Sequence[Sequence[Observation]], wait: Callable[[], object]
    ) -> None:
        self.policy, self.wait = policy, wait
        self.steps = [(number == 0, step) for episode in episodes for number, step in enumerate(episode)]
        self.turn = 0
        self.kinds: list[str] = []

    def __call__(self) -> dict[str, float]:
        begins, observation = self.steps[self.turn % len(self.steps)]
        self.turn += 1
        if begins:
            self.policy.reset()
        self.wait()
        start = time.perf_counter()
        self.policy.act(self.policy.observe(observation))
        self.wait()
        seconds = time.perf_counter() - start
        facts = mmaccel.report(self.policy.model).facts if attached(self.policy.model) else {}
        self.kinds += [step["kind"] for step in facts.get("steps", ())]
        return {"seconds": seconds}


def measure(
    shape: str, chosen: Sequence[Setting], rounds: int, device: str = "cpu", progress: Progress = silent
) -> list[Row]:
    """A row a setting, and one for the oracle of each that drops tokens: the seconds of every turn.

    The oracle works on the tokens that a step kept that drops some; see `vision_tokens.oracle`.
    """
    on_gpu = torch.device(device).type == "cuda"
    wait = partial(torch.cuda.synchronize, device) if on_gpu else (lambda: None)
    if shape == "pocket":
        plain = load(device=device)
        episodes = recorded(plain, 4)
    else:
        plain, episodes = stand_in(shape, device)
    turns: dict[str, Turns] = {}
    runs: dict[str, Callable[[], dict[str, float]]] = {}
    with torch.inference_mode():
        for setting in chosen:
            model = mmaccel.apply(twin(plain.model), *setting.methods) if setting.methods else plain.model
            policy = with_model(plain, model)
            turns[setting.name] = runs[setting.name] = Turns(policy, episodes, wait)
            if setting.methods:
                runs[f"{setting.name} oracle"] = oracle_of(plain, policy, episodes[0], wait)
        found = interleave(runs, rounds, progress=progress)
    return [
        {
            "setting": name,
            "shape": shape,
            "execute": plain.execute,
            "seconds": quantities["seconds"].tolist(),
            "dense_steps": sum(kind != "pruned" for kind in turns[name].kinds[1:]) if name in turns else 0,
        }
        for name, quantities in found.items()
    ]


def oracle_of(
    plain: ActionTokenPolicy, decorated: ActionTokenPolicy, episode: Sequence[Observation], wait: Callable[[], object]
) -> Callable[[], dict[str, float]]:
    """The oracle of what the decorated policy keeps in the last step of an episode, to be timed."""
    decorated.reset()
    for observation in episode:
        inputs = decorated.observe(observation)
        decorated.act(inputs)
    oracle, tokens = Oracle(plain.model, read_by(decorated.model, inputs.model)), plain.written

    def run() -> dict[str, float]:
        wait()
        start = time.perf_counter()
        oracle.generate(inputs.model, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        wait()
        return {"seconds": time.perf_counter() - start}

    return run


def tail(sample: Samples) -> Samples:
    """The 99th percentile, of the last axis."""
    return np.asarray(np.percentile(sample, 99, axis=-1))


def compare(rows: Sequence[Row]) -> dict[str, Figure]:
    """`latency.SETTING` (median, seconds), `latency_p99`, `control` (actions executed a second of policy time),
    `speedup` over dense, `p99_ratio` to dense's, `oracle_ratio` and `speedup_limit`, the oracle's over dense."""
    seconds = {row["setting"]: np.asarray(row["seconds"]) for row in rows}
    figures = {}
    for row in rows:
        name, own = row["setting"], seconds[row["setting"]]
        if name.endswith(" oracle"):
            continue
        figures[f"latency.{name}"] = median(own, "s")
        figures[f"latency_p99.{name}"] = bootstrap(tail, own, unit="s")
        figures[f"control.{name}"] = Figure(row["execute"] / float(np.median(own)), unit="actions/s")
        if name != "dense":
            figures[f"speedup.{name}"] = median_ratio(seconds["dense"], own)
            figures[f"p99_ratio.{name}"] = bootstrap(
                lambda one, other: tail(one) / tail(other), own, seconds["dense"], unit="x"
            )
        if (oracle := seconds.get(f"{name} oracle")) is not None:
            figures[f"oracle_ratio.{name}"] = median_ratio(own, oracle)
            figures[f"speedup_limit.{name}"] = median_ratio(seconds["dense"], oracle)
    return figures
