"""Which tokens see which: a whole attention mask for one call of a model, whatever its class makes of masks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmaccel.attachment import Attachment
from mmaccel.methods import Unsupported
from mmaccel.scoped import within

BLOCKS = {"imagegpt": "transformer.h"}
"""Classes that flatten any mask they are given: where their blocks are, whose third argument is the finished mask."""

KERNELS = ("eager", "sdpa")  # attention that takes a mask of any form

_mask: ContextVar[Tensor | None] = ContextVar("mask", default=None)


def take_masks(name: str, target: Any, attachment: Attachment) -> None:
    """Makes `visible` work on this model.

    name: of the method that needs it.  Raises Unsupported for classes that take no positions, attention kernels that
    take no such mask, and models that, tried on four words, do not read them out of order as they read them in order.
    """
    if "position_ids" not in inspect.signature(target.forward).parameters:
        raise Unsupported(f"{name} reads tokens out of order; {type(target).__name__} takes no position_ids")
    kernel = target.config._attn_implementation
    if kernel not in KERNELS:
        raise Unsupported(
            f"{name} hides single tokens from others, which {kernel!r} attention cannot; call "
            'model.set_attn_implementation("sdpa") first'
        )
    if path := BLOCKS.get(target.config.model_type):
        for block in target.get_submodule(path):
            attachment.pre_hook(block, _put)
    if (apart := _out_of_order(target)) > tolerance(target.dtype):
        raise Unsupported(
            f"{name} reads tokens out of order, by their positions and a mask; {type(target).__name__} gives other "
            f"logits then: {apart:.1e} of the largest"
        )


def tolerance(kind: torch.dtype) -> float:
    """How far logits may be apart that should be equal, as a share of the largest."""
    return 1e-3 if torch.finfo(kind).bits >= 32 else 3e-2


@contextmanager
def visible(model: Any, seen: Bool[Tensor, "rows reading keys"]) -> Iterator[Tensor | None]:
    """For the block, each token that the model reads sees just those keys.  Gives the `attention_mask` to call it with.

    seen: of all keys, those of the cache first, then those that are read.
    """
    mask = _finished(seen, model.dtype)
    if model.config.model_type not in BLOCKS:
        yield mask
        return
    with within(_mask, mask):
        yield None


def _finished(seen: Tensor, kind: torch.dtype) -> Float[Tensor, "rows 1 reading keys"]:
    """What is added to attention's scores."""
    mask = torch.zeros(seen.shape, dtype=kind, device=seen.device)
    return mask.masked_fill(~seen, torch.finfo(kind).min)[:, None]


def _put(module: Any, args: Any, kwargs: Any) -> Any:
    """The mask of the block that surrounds the call, in place of the model's own."""
    mask = _mask.get()
    return None if mask is None else ((*args[:2], mask, *args[3:]), kwargs)


def _out_of_order(model: Any) -> float:
    """How far the third of four words is from its logits when it is read last, as a share of the largest."""
    from transformers import DynamicCache

    words = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        plain = model(input_ids=words, use_cache=False).logits[0, 2].float()
        for place, seen in (([0, 1, 3], torch.ones(3, 3).tril()), ([2], torch.tensor([[1.0, 1.0, 0.0, 1.0]]))):
            places = torch.tensor([place], device=model.device)
            with visible(model, seen.bool()[None].to(model.device)) as mask:
                found = model(
                    input_ids=words[:, places[0]], attention_mask=mask, position_ids=places, past_key_values=cache,
                    use_cache=True,
                )  # fmt: skip
    return float((found.logits[0, -1].float() - plain).abs().max() / plain.abs().max())
