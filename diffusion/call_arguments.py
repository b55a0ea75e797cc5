"""What the arguments of a pipeline's call say of its samples: how many, of which prompts, from which seeds."""

from __future__ import annotations

from typing import Any

import torch

from diffusion.problem import seed_of


def samples_of(arguments: dict[str, Any]) -> int:
    """How many samples a call makes: prompts (or class labels) times samples a prompt."""
    several = max(arguments.get(f"num_{kind}_per_prompt") or 1 for kind in ("images", "videos"))
    for name in ("prompt", "class_labels", "prompt_embeds"):
        given = arguments.get(name)
        if given is not None:
            return several * (1 if isinstance(given, str | int) else len(given))
    return int(several)


def prompts_of(arguments: dict[str, Any], samples: int) -> list[str | None]:
    """The prompt of each sample; None where the pipeline was given none."""
    given = arguments.get("prompt")
    prompts = [given] if given is None or isinstance(given, str) else list(given)
    return [prompt for prompt in prompts for _ in range(samples // len(prompts))]


def generators_of(arguments: dict[str, Any], samples: int) -> tuple[list[int], list[torch.Generator]]:
    """The seed of each sample, and a generator that starts from it.

    A fresh generator's own seed is taken, a used one draws a new seed, and without one torch's global generator does;
    samples beyond the one generator given get seeds derived from it.  Afterwards the generators are used ones.
    """
    given = arguments.get("generator")
    owners = list(given) if isinstance(given, list | tuple) else [given]
    if len(owners) not in (1, samples):
        raise ValueError(f"{samples} samples need one generator or {samples}; got {len(owners)}")
    seeds = [_seed(owner) for owner in owners]
    if len(seeds) < samples:
        seeds += [seed_of(seeds[0], -1, sample) for sample in range(1, samples)]
    device = owners[0].device if owners[0] is not None else "cpu"
    return seeds, [torch.Generator(device).manual_seed(seed) for seed in seeds]


def _seed(generator: torch.Generator | None) -> int:
    if generator is None:
        return int(torch.randint(2**31, ()))
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    unused = torch.equal(fresh.get_state(), generator.get_state())
    drawn = int(torch.randint(2**31, (), generator=generator, device=generator.device))  # used from now on
    return generator.initial_seed() if unused else drawn
