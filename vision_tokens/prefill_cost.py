"""What a prefill of the language model costs, counted by running its shapes, not its numbers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from mmaccel.flops import count_flops


def prefill_flops(text: nn.Module, batch: int, tokens: int) -> int:
    """Floating-point operations of the language model's layers (no vocabulary projection) on `tokens` a row.

    Counted with torch's own counter on a twin on the meta device, where tensors have shapes and no values, built from
    the model's configuration: other threads may be running the model itself, whose adapters and quantisation, if any,
    are left out of the count.
    """
    from transformers import DynamicCache

    config: Any = copy.deepcopy(text.config)
    config._attn_implementation = "sdpa"
    with torch.no_grad(), torch.device("meta"):
        twin = type(text)(config).to(next(text.parameters()).dtype)
        inputs = torch.empty(batch, tokens, int(config.hidden_size), dtype=next(twin.parameters()).dtype)
        positions = torch.empty(batch, tokens, dtype=torch.long)
        cache = DynamicCache(config=config)
        return count_flops(lambda: twin(inputs_embeds=inputs, position_ids=positions, past_key_values=cache))
