"""Attention masks of the columns that are held, cut from masks of the whole sequence.

A mask of shape [batch, tokens] says which tokens are padding; the language model makes the rest of it.  A *finished*
mask, [batch, heads, queries, keys], or one for each type of layer, says all: it comes from multimodal models whose
pictures attend both ways (Gemma 3, PaliGemma, Molmo), and is made here, by transformers' own functions, for language
models whose layers have windows.  Both kinds are made for original places, so that windows and blocks lie where they
would lie if nothing were dropped; then the rows and columns of the tokens held are gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmaccel.methods import Unsupported
from mmaccel.scoped import within
from vision_tokens.kept_columns import masking_original, shown_length

Finished = Tensor | Mapping[str, Tensor | None] | None


def window_of(config: Any) -> int | None:
    """The number of original places that layers of a language model look back, if some are limited."""
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    types = getattr(config, "layer_types", None)
    return int(window) if window and (types is None or set(types) != {"full_attention"}) else None


def is_finished(mask: Finished) -> bool:
    """Whether a mask says everything, or just what is padding."""
    return isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.dim() == 4)


def finish(config: Any, embeddings: Tensor, mask: Tensor | None, cache: Any) -> Finished:
    """The finished masks that a language model of this configuration would make of the whole sequence.

    By type of layer if there are several; models with one type take one mask, and some of them no mapping.
    """
    from transformers.masking_utils import create_masks_for_generate

    with within(masking_original, True):
        masks: Finished = create_masks_for_generate(config, embeddings, mask, cache)
    return next(iter(masks.values())) if isinstance(masks, Mapping) and len(masks) == 1 else masks


def gather_finished(
    masks: Finished, config: Any, cache: Any, rows: Int[Tensor, "batch queries"], columns: Int[Tensor, "batch keys"]
) -> Finished:
    """Finished masks of the tokens held.

    masks: over the new tokens and all seen ones.  rows: the new tokens held, as places among the new ones; columns:
    the original places of all columns, with the new ones at the end.  Both are -1 where there is padding.
    Raises `Unsupported` for kernels that take no such masks, for masks of another size, and where a layer with a
    window lets go of a column too early.
    """
    if "flash" in config._attn_implementation:
        raise Unsupported(
            f"layers with windows, and pictures that attend both ways, need a mask entry for every pair of tokens once "
            f"some are dropped, which {config._attn_implementation} does not take; load the model with "
            "attn_implementation='sdpa'"
        )
    if not isinstance(masks, Mapping):
        return gathered(masks, rows, columns, shown_length(cache, 0) + rows.shape[1])
    types = list(config.layer_types)
    return {
        kind: gathered(mask, rows, columns, shown_length(cache, types.index(kind)) + rows.shape[1])
        for kind, mask in masks.items()
        if kind in types
    }


def gathered(
    mask: Tensor | None, rows: Int[Tensor, "batch queries"], columns: Int[Tensor, "batch keys"], shown: int
) -> Tensor | None:
    """One finished mask's rows, and its last `shown` columns of those held; None lets all that came before be seen."""
    gone, columns = columns[:, :-shown], columns[:, -shown:]
    if mask is None:
        if bool((columns >= 0).all()):
            return None
        new = columns[:, -rows.shape[1] :]
        return ((columns[:, None] <= new[..., None]) & (columns >= 0)[:, None])[:, None]
    mask = mask.expand(len(rows), *mask.shape[1:])
    mask = mask.gather(2, rows.clamp(min=0)[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
    if gone.shape[1] and bool((gone < 0).any() | (columns < 0).any()):
        _refuse_early_loss(_columns_of(mask, gone))
    return _columns_of(mask, columns)


def _columns_of(mask: Tensor, columns: Int[Tensor, "batch keys"]) -> Tensor:
    index = columns.clamp(min=0)[:, None, None].expand(-1, *mask.shape[1:3], -1)
    never = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.gather(3, index).masked_fill((columns < 0)[:, None, None], never)


def _refuse_early_loss(gone: Tensor) -> None:
    """Padding on the right stands between a row's tokens, and takes places in a window that they would need."""
    seen: Bool[Tensor, "..."] = gone if gone.dtype == torch.bool else gone == 0
    if bool(seen.any()):
        raise Unsupported(
            "a layer with a window let go of tokens that a row still needs, because of padding between them; pad "
            "prompts on the left, and run rows whose later turns bring images one by one"
        )
