"""Places of the tokens that stay of a prompt, and what is gathered at them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmaccel.methods import Unsupported

if TYPE_CHECKING:
    from vision_tokens.encoding import Encoded


def spread_over(placeholders: Bool[Tensor, "batch new"], encoded: Encoded) -> Bool[Tensor, "batch new"]:
    """The images' decisions at their placeholders, False elsewhere.  Raises `Unsupported` as `copies_of` does."""
    copies = copies_of(placeholders, encoded)
    out = placeholders.clone()
    by_prompt = torch.cat(encoded.keep).to(out.device).split_with_sizes(placeholders[::copies].sum(dim=-1).tolist())
    for row in range(len(out)):
        out[row, placeholders[row]] = by_prompt[row // copies]
    return out


def copies_of(placeholders: Bool[Tensor, "batch new"], encoded: Encoded) -> int:
    """How many rows hold the images of one prompt: `generate` repeats it for beams and samples, as a group of rows.

    Raises `Unsupported` if the prompt does not have a place for every visual token.
    """
    found = int(placeholders.sum())
    copies = found // encoded.tokens
    if copies == 0 or found % encoded.tokens or len(placeholders) % copies:
        raise Unsupported(
            f"the prompt has {found} places for visual tokens, its images have {encoded.tokens}; chunked prefill "
            "(prefill_chunk_size) is not supported"
        )
    return copies


def rows_to_gather(
    keep: Bool[Tensor, "batch new"], mask: Bool[Tensor, "batch new"] | None
) -> Int[Tensor, "batch held"]:
    """Per row the places of the tokens that stay and are not padding; rows are filled up with -1 to equal length.

    Rows are filled on the left, or on the right if the prompt is padded there.
    """
    keep = keep if mask is None else keep & mask
    lengths = keep.sum(dim=-1, keepdim=True)
    width = int(lengths.max())
    places = keep.logical_not().int().argsort(dim=-1, stable=True)[:, :width]  # kept ones first, in order
    places = torch.where(torch.arange(width, device=keep.device) < lengths, places, -1)
    padded_right = mask is not None and not bool(mask[:, -1].all())
    if padded_right or bool((lengths == width).all()):
        return places
    shift = (torch.arange(width, device=keep.device) - (width - lengths)) % width
    return places.gather(-1, shift)


def gather(rows: Tensor, index: Int[Tensor, "batch held"]) -> Tensor:
    """The rows at the given places: [batch, new, width] -> [batch, held, width]; padding repeats place 0."""
    return rows.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, rows.shape[-1]))


def mask_for(
    index: Int[Tensor, "batch held"], mask: Bool[Tensor, "batch seen"] | None, has_cache: bool
) -> Int[Tensor, "batch held"] | None:
    """The attention mask of the held columns, from the mask of the original sequence.

    None where nothing is masked, so that fused kernels stay on their fast path; but explicit without a cache, where
    transformers would read gaps in the positions as several packed sequences.
    """
    held = index >= 0
    if mask is not None:
        held = held & mask.gather(-1, index.clamp(min=0))
    return None if has_cache and bool(held.all()) else held.long()
