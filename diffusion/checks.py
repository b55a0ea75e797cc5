"""What a search needs of a pipeline: a scheduler that it can work with, and models that stay where they are."""

from __future__ import annotations

from typing import Any

from diffusion.denoiser import DENOISERS
from diffusion.schedules import check_scheduler, check_step
from diffusion.search import Search
from mmaccel.methods import Unsupported


def check_search(search: Search, scheduler: Any) -> None:
    """Raises Unsupported if this search cannot work with this scheduler, naming one that it works with."""
    if search.chooses:
        check_step(scheduler)
        if not search.whole_samples:
            check_scheduler(scheduler)


def refuse_state(pipeline: Any) -> None:
    """Raises Unsupported for what holds state of one trajectory, or moves models while a search needs them."""
    name = type(pipeline).__name__
    for denoiser in DENOISERS:
        if getattr(getattr(pipeline, denoiser, None), "is_cache_enabled", False):
            raise Unsupported(
                f"the {denoiser} of {name} has a step cache, which holds the state of one trajectory; call "
                f"pipe.{denoiser}.disable_cache() before a search"
            )
    if getattr(pipeline, "_all_hooks", None) or any(_moves(part) for part in pipeline.components.values()):
        raise Unsupported(
            f"{name} offloads its models after each use, and a search uses them in turn; keep them on the device "
            "(pipe.remove_all_hooks()), or use group offloading of the denoiser"
        )


def _moves(model: Any) -> bool:
    """Whether accelerate moves the model's weights at every call: then there is a hook on the model itself, too."""
    if not hasattr(model, "_hf_hook"):
        return False
    hooks = [getattr(part, "_hf_hook", None) for part in model.modules()]
    return any(getattr(hook, "offload", False) for each in hooks for hook in getattr(each, "hooks", [each]))
