"""What a prefill of the language model costs, counted by running its shapes, not its numbers."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def attention_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *args: Any, **kw: Any) -> int:
    """Multiply-adds, doubled, of one scaled-dot-product attention, causal or not: both of its matrix products."""
    *batch, queries, width = query
    return 2 * math.prod(batch) * queries * key[-2] * (width + value[-1])


FLOP_RULES = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
"""For FlopCounterMode's `custom_mapping`: the CPU kernel that it does not count by itself."""


def prefill_flops(text: nn.Module, batch: int, tokens: int) -> int:
    """Floating-point operations of the language model's layers (no vocabulary projection) on `tokens` a row.

    Counted with torch's own counter on a twin on the meta device, where tensors have shapes and no values, built from
    the model's configuration: other threads may be running the model itself, whose adapters and quantisation, if any,
    are left out of the count.
    """
    from transformers import DynamicCache

    config: Any = copy.deepcopy(text.config)
    config._attn_implementation = "sdpa"
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_RULES)
    with torch.no_grad(), torch.device("meta"):
        twin = type(text)(config).to(next(text.parameters()).dtype)
        inputs = torch.empty(batch, tokens, int(config.hidden_size), dtype=next(twin.parameters()).dtype)
        positions = torch.empty(batch, tokens, dtype=torch.long)
        with counter:
            twin(inputs_embeds=inputs, position_ids=positions, past_key_values=DynamicCache(config=config))
    return int(counter.get_total_flops())
