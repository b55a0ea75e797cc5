"""What every mechanism in front of and inside the language model knows of a prompt, and what all of them refuse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mmaccel.methods import Method, Unsupported
from vision_tokens.families import Host
from vision_tokens.families.facts import PIXELS

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment

KERNELS = ("eager", "sdpa", "flash")
_visual: ContextVar[Bool[Tensor, "batch new"] | None] = ContextVar("visual", default=None)


def placeholders_in(host: Host, inputs: Mapping[str, Any], kind: str = "image") -> Bool[Tensor, "batch new"]:
    """The places of a prompt that the tokens of images, or of videos, take."""
    if (tokens := inputs.get("input_ids")) is not None:
        return torch.as_tensor(tokens == host.tokens[kind])
    embeddings: Tensor = inputs["inputs_embeds"]
    token = torch.tensor(host.tokens[kind], device=embeddings.device)
    return torch.as_tensor((embeddings == host.text.get_input_embeddings()(token)).all(dim=-1))  # type: ignore[operator]


def visual_places() -> Bool[Tensor, "batch new"] | None:
    """Which of the tokens that the language model reads in this thread's forward are visual; None without images."""
    return _visual.get()


def set_visual_places(places: Bool[Tensor, "batch new"] | None) -> None:
    """Tells the mechanisms inside the language model which of its tokens are visual."""
    _visual.set(places)


def note_visual_places(host: Host, kwargs: Mapping[str, Any]) -> bool:
    """Tells the mechanisms inside the language model which tokens of a multimodal model's call are visual.

    Returns whether the call reads images or videos, as pixels or encoded.
    """
    set_visual_places(None)
    encoded = kwargs.get("mm_encoder_outputs")
    given = [*encoded.values()] if isinstance(encoded, Mapping) else [encoded]
    if all(value is None for value in (*given, *(kwargs.get(name) for name in PIXELS.values()))):
        return False
    set_visual_places(torch.stack([placeholders_in(host, kwargs, kind) for kind in host.tokens]).any(dim=0))
    return True


def keep_visual_places(index: Int[Tensor, "batch held"]) -> None:
    """Of the tokens that the language model was going to read, it reads those at `index`; -1 is padding."""
    if (places := _visual.get()) is not None:
        _visual.set(places.gather(1, index.clamp(min=0)) & (index >= 0))


def refuse_places(method: Method, kwargs: Mapping[str, Any]) -> None:
    """Raises `Unsupported` for arguments that speak of places in the whole prompt: logits are of the kept tokens."""
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise Unsupported(
            f"{method.name} drops tokens, so places in the prompt do not index its logits; pass "
            "logits_to_keep as a number of last tokens"
        )
    if kwargs.get("labels") is not None:
        raise Unsupported(
            f"{method.name} drops tokens, so labels for the whole prompt do not fit its logits; compute the "
            "loss on mmaccel.remove(model), or take the logits without labels"
        )


def refuse_static(method: Method, cache: Any) -> None:
    """Raises `Unsupported` for a cache that cannot follow a prompt that gets shorter."""
    if getattr(cache, "is_compileable", False):
        raise Unsupported(
            f"{method.name} shortens the prompt, which a static cache cannot follow; leave "
            "cache_implementation unset (a dynamic cache)"
        )


def refuse_other_caches(method: Method, kwargs: Mapping[str, Any]) -> None:
    """Raises `Unsupported` for a call of the language model without a cache, or with one that cannot be cut."""
    cache = kwargs.get("past_key_values")
    if kwargs.get("use_cache") is False and cache is None:
        raise Unsupported(
            f"{method.name} shrinks the key-value cache, and this call keeps none; leave use_cache on, or "
            "call mmaccel.remove(model) first"
        )
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    if getattr(cache, "offloading", False) or not kinds <= {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        raise Unsupported(
            f"{method.name} evicts from a dynamic cache that stays on the device; this call's "
            f"{type(cache).__name__} holds {', '.join(sorted(kinds))}: leave cache_implementation unset"
        )


def hooked_by(host: Host, *kinds: type) -> bool:
    """Whether hooks of these kinds hang on the model."""
    hooks = [*host.multimodal._forward_pre_hooks.values(), *host.text._forward_pre_hooks.values()]
    return any(isinstance(getattr(hook, "__self__", None), kinds) for hook in hooks)


def refuse_second(host: Host, kind: type) -> None:
    """Raises `Unsupported` if hooks of this kind hang on the model already, through some other object."""
    if hooked_by(host, kind):
        raise Unsupported(
            f"this {type(host.multimodal).__name__} is decorated already, through an object that wraps it or that "
            "it wraps (PEFT, a task head); call mmaccel.remove or mmaccel.apply on that object"
        )


def kernel_of(method: Method, host: Host) -> str:
    """The language model's attention implementation.  Raises `Unsupported` for those whose masks cannot be cut."""
    kernel = str(host.text.config._attn_implementation)  # type: ignore[union-attr]
    if not any(name in kernel for name in KERNELS):
        raise Unsupported(
            f"{method.name} cuts masks of the kernels eager, sdpa and flash attention; this model runs "
            f"{kernel!r}: call model.set_attn_implementation('sdpa') first"
        )
    return kernel


def refuse_flash(method: Method, kernel: str) -> None:
    """Raises `Unsupported` for an attention implementation that takes no finished masks."""
    if "flash" in kernel:
        raise Unsupported(
            f"{method.name} needs a mask entry for every pair of tokens, which {kernel} does not take; load the model "
            "with attn_implementation='sdpa'"
        )


def refuse_other_kernel(method: Method, host: Host, kernel: str) -> None:
    """Raises `Unsupported` if the attention implementation is another one than when the method was applied."""
    if (now := str(host.text.config._attn_implementation)) != kernel:  # type: ignore[union-attr]
        raise Unsupported(
            f"the language model's attention implementation was {kernel!r} when {method.name} was "
            f"applied, and is {now!r} now; call mmaccel.apply again"
        )


def refuse_chunks(target: nn.Module, attachment: Attachment, method: Method) -> None:
    """Lets generate's prefill show the whole prompt at once, or raise `Unsupported`; methods share one such check."""
    if refuse_chunks in attachment.shared:
        return
    attachment.shared[refuse_chunks] = True

    def whole(prefill: Callable[..., Any], input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_config.prefill_chunk_size is not None:
            raise Unsupported(
                f"{method.name} ranks tokens by the whole prompt, so it cannot be read in chunks; "
                "leave generate's prefill_chunk_size unset"
            )
        return prefill(input_ids, generation_config, *args, **kwargs)

    for module in target.modules():
        if hasattr(type(module), "_prefill"):
            attachment.set_attribute(module, "_prefill", functools.partial(whole, module._prefill))  # type: ignore[arg-type]


def padding_of(mask: Any, new: int) -> Bool[Tensor, "batch new"] | None:
    """Which of the new tokens are real, from any mask that a language model takes; None if all are.

    In a finished mask, [batch, heads, new, seen], a token of padding does not see itself.
    """
    if isinstance(mask, Mapping):
        mask = next((one for one in mask.values() if one is not None), None)
    if mask is None:
        return None
    if mask.dim() == 4:
        shown = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
        real = shown.diagonal(shown.shape[-1] - new, dim1=-2, dim2=-1)
    else:
        real = mask[:, -new:].bool()
    return None if bool(real.all()) else real
