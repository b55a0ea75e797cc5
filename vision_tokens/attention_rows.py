"""Reading a few rows of a model's attention while the user's own kernel does the attending.

Fused kernels return no weights.  So attention goes through a registered name of ours, which calls the kernel that was
there and, when asked, computes just what a method wants from the same queries and keys: one row for a class token
(O(n) time), the attention that each token receives (O(n^2) time, in blocks: O(n) memory), or the keys.  No n-by-n
matrix, and the kernel's output is untouched.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mmaccel.scoped import within

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment

PREFIX = "mmaccel_"
BLOCK = 256  # query rows computed at a time when every token's received attention is wanted

Reader = Callable[[Tensor, Tensor, float, Tensor | None], Tensor]
"""What to compute from queries, keys, scaling and mask: [batch, rows, tokens]."""


class Recorded(dict[nn.Module, list[Tensor]]):
    """For every module that was read, one tensor a call of its attention.  seconds: what reading took."""

    seconds: float = 0.0


asking_rows: ContextVar[Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]] | None] = ContextVar(
    "asking", default=None
)
"""In a layer that runs on some of its tokens only: gives its queries and mask the others' rows, for the readers."""
_recordings: ContextVar[tuple[tuple[Mapping[nn.Module, Reader], Recorded], ...]] = ContextVar("recordings", default=())


def class_attention(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch heads keys width"],
    scaling: float,
    mask: Tensor | None = None,
) -> Float[Tensor, "batch heads cells"]:
    """What the class token (query 0) attends to: softmax over all keys, the class token's own column then cut off.

    Source: HiRED (arXiv:2408.10945), section 3.2; the row is not renormalised afterwards.
    """
    return attention_rows(query[:, :, :1], key, scaling, _mask_rows(mask, 0, 1))[:, :, 0, 1:]


def received_attention(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch heads keys width"],
    scaling: float,
    mask: Tensor | None = None,
) -> Float[Tensor, "batch heads keys"]:
    """The mean, over the queries that see it, of the attention that each key gets; in blocks of `BLOCK` queries.

    So it is the same whether pictures are read one by one or, as some encoders do, as one sequence with a mask.
    """
    total = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
    for start in range(0, query.shape[2], BLOCK):
        rows = query[:, :, start : start + BLOCK]
        total += attention_rows(rows, key, scaling, _mask_rows(mask, start, rows.shape[2])).float().sum(dim=2)
    return total / _queries_that_see(mask, query.shape[2])


def mean_keys(
    query: Tensor, key: Float[Tensor, "batch heads tokens width"], scaling: float, mask: Tensor | None = None
) -> Float[Tensor, "batch width tokens"]:
    """The keys, averaged over the heads."""
    return rearrange(key.mean(dim=1), "batch tokens width -> batch width tokens")


def patch_keys(
    query: Tensor, key: Float[Tensor, "batch heads tokens width"], scaling: float, mask: Tensor | None = None
) -> Float[Tensor, "batch width cells"]:
    """The keys, averaged over the heads, of all tokens but the class token (token 0)."""
    return mean_keys(query, key[:, :, 1:], scaling)


def heads_joined(read: Reader) -> Reader:
    """The same reading of all heads joined to one of their whole width."""

    def joined(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
        query = rearrange(query, "batch heads tokens width -> batch 1 tokens (heads width)")
        key = rearrange(key, "batch heads tokens width -> batch 1 tokens (heads width)")
        return read(query, key, query.shape[-1] ** -0.5, mask)

    return joined


def attention_rows(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch key_heads keys width"],
    scaling: float,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """softmax(q k^T * scaling + mask) for the given queries, the softmax in float32, in the queries' dtype or another.

    Where several heads share a key head (grouped queries), their rows are stacked, and keys are never repeated.
    """
    key_heads = key.shape[1]
    stacked = rearrange(query, "batch (shared group) row width -> batch shared (group row) width", shared=key_heads)
    logits = rearrange(
        (stacked @ key.mT).mul_(scaling),
        "batch shared (group row) key -> batch (shared group) row key",
        row=query.shape[2],
    )
    if mask is not None:
        logits = logits.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(dim=-1, dtype=torch.float32).to(dtype or query.dtype)


def _queries_that_see(mask: Tensor | None, queries: int) -> Tensor | int:
    """By key, [batch, heads or 1, keys]; at least 1."""
    if mask is None or mask.shape[-2] == 1:
        return queries
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return shown.sum(dim=-2).clamp(min=1)


def _mask_rows(mask: Tensor | None, start: int, rows: int) -> Tensor | None:
    if mask is None or mask.shape[-2] == 1:
        return mask
    return mask[..., start : start + rows, :]


@contextmanager
def recording(readers: Mapping[nn.Module, Reader]) -> Iterator[Recorded]:
    """Records, in this thread and for the length of the block, what the readers make of their modules' attention.

    Recordings at the same time each get their own, in whatever order they end.
    """
    recorded = Recorded({module: [] for module in readers})
    mine = readers, recorded
    _recordings.set((*_recordings.get(), mine))
    try:
        yield recorded
    finally:
        _recordings.set(tuple(other for other in _recordings.get() if other is not mine))


def unrecorded() -> AbstractContextManager[None]:
    """Within the block, recordings that began before it hear nothing."""
    return within(_recordings, ())


def listen(attachment: Attachment, modules: list[nn.Module]) -> None:
    """Routes the attention of these modules, and of no others, through our name.

    Each gets a copy of its configuration to carry the name, since whole encoders, and even two models, share one
    object.  The encoder makes its masks by its own configuration: for the very kernel that we call.  A module that two
    methods read is routed once.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for module in modules:
        config: Any = copy.copy(module.config)
        kernel = config._attn_implementation or "eager"
        if kernel.startswith(PREFIX):
            continue
        name = PREFIX + kernel  # contains "flash" exactly when the kernel's name does: models branch on it
        if name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(name, _attention_through(kernel))
        config._attn_implementation_internal = name
        attachment.set_attribute(module, "config", config)


def _attention_through(kernel: str) -> Callable[..., Any]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        for readers, recorded in _recordings.get():
            if (read := readers.get(module)) is not None:
                with torch.no_grad():  # a choice has no gradient, and a checkpointed layer must save the same tensors
                    whole = asking_rows.get()
                    rows, mask = (query, attention_mask) if whole is None else whole(query, attention_mask)
                    settle(key.device)
                    start = time.perf_counter()
                    recorded[module].append(read(rows, key, scaling, mask))
                    settle(key.device)
                    recorded.seconds += time.perf_counter() - start
        return _kernel(kernel, module)(module, query, key, value, attention_mask, **kwargs)

    return attend


def _kernel(name: str, module: nn.Module) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own_eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    kernel: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, own_eager)
    return kernel


def settle(device: torch.device) -> None:
    """Waits for a GPU to finish what it was given, so that a clock beside it tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
