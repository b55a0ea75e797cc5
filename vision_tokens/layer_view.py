"""What a method sees of one decoder layer's attention while a prompt is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision_tokens.attention_rows import BLOCK, attention_rows


@dataclass(frozen=True)
class LayerView:
    """One layer's attention to the tokens of the prompt that are still there; nothing is computed before it is asked.

    query, key, scaling, mask: as the layer's kernel gets them; keys of an earlier turn come first.
    visual, real: which of the tokens are visual, and which are no padding.
    marked: places of the tokens that the method's `mark` chose, filled up with -1.
    causal: whether no token sees a later one.
    """

    query: Float[Tensor, "batch heads tokens width"]
    key: Float[Tensor, "batch key_heads keys width"]
    scaling: float
    mask: Tensor | None
    visual: Bool[Tensor, "batch tokens"]
    real: Bool[Tensor, "batch tokens"]
    marked: Int[Tensor, "batch marked"] | None = None
    causal: bool = True

    @property
    def last(self) -> Int[Tensor, "batch one"]:
        """The place of each row's last token."""
        tokens = self.real.shape[1]
        return (self.real * torch.arange(1, tokens + 1, device=self.real.device)).argmax(dim=-1, keepdim=True)

    def without_values(self) -> LayerView:
        """The same shapes on the meta device: what it costs to ask can then be counted at any time."""
        bare: dict[str, Any] = {
            name: torch.empty_like(value, device="meta")
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **bare)

    def rows(self, places: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch heads rows tokens"]:
        """What the tokens at these places attend to: a softmax over all keys, an earlier turn's then cut off.

        O(n) a row.  Rows at -1 and those of padding are zero.
        """
        return self.rows_to_all(places)[..., -self.real.shape[1] :]

    def rows_to_all(self, places: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch heads rows keys"]:
        """The same with an earlier turn's keys."""
        given, places = places, places.clamp(min=0)
        heads, _, width = self.query.shape[1:]
        query = self.query.gather(2, places[:, None, :, None].expand(-1, heads, -1, width))
        attention = attention_rows(query, self.key, self.scaling, self._mask_of(places), torch.float32)
        real = (given >= 0) & self.real.gather(1, places)
        return attention.where(real[:, None, :, None], 0)

    def blocks(self, temperature: float = 1.0) -> Iterator[tuple[int, Float[Tensor, "batch heads rows columns"]]]:
        """All rows, `BLOCK` at a time from the last to the first, with the place of the first row of each.

        In a causal layer the columns end with the block's last row.  O(n^2) time, O(n) memory.  temperature: the
        logits are divided by it; 1 is the model's own attention.
        """
        batch, _, tokens, _ = self.query.shape
        past, padded = self.key.shape[2] - tokens, self.real.is_meta or not bool(self.real.all())
        for start in reversed(range(0, tokens, BLOCK)):
            stop = min(start + BLOCK, tokens)
            end = past + stop if self.causal else past + tokens
            mask = self._mask_of(torch.arange(start, stop, device=self.query.device).expand(batch, -1))[..., :end]
            if mask.dtype != torch.bool:
                mask = mask / temperature
            query, key = self.query[:, :, start:stop], self.key[:, :, :end]
            attention = attention_rows(query, key, self.scaling / temperature, mask, torch.float32)
            if padded:
                attention = attention.where(self.real[:, None, start:stop, None], 0)
            yield start, attention[..., past:]

    def _mask_of(self, places: Int[Tensor, "batch rows"]) -> Tensor:
        """The rows of the mask at these places, [batch, heads or 1, rows, keys], boolean or to be added."""
        keys, tokens = self.key.shape[2], self.query.shape[2]
        if self.mask is not None and self.mask.dim() == 4:
            mask = self.mask.expand(len(places), -1, -1, -1)
            return mask.gather(2, places[:, None, :, None].expand(-1, mask.shape[1], -1, keys))
        shown = torch.arange(keys, device=places.device) <= places[..., None] + keys - tokens
        if self.mask is not None:
            shown = shown & self.mask[:, None, :].bool()
        return shown[:, None]


def sees_the_future(mask: Tensor | None, tokens: int) -> bool:
    """Whether a kernel's mask lets any of the last `tokens` tokens see a later one."""
    if mask is None or mask.dim() != 4:
        return False
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool(shown.triu(1 + mask.shape[-1] - tokens).any())
