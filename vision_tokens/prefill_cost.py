"""What a prefill of the language model costs, counted by running its shapes, not its numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def attention_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *args: Any, **kw: Any) -> int:
    """Multiply-adds, doubled, of one scaled-dot-product attention, causal or not: both of its matrix products."""
    *batch, queries, width = query
    return 2 * math.prod(batch) * queries * key[-2] * (width + value[-1])


FLOP_RULES = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
"""For FlopCounterMode's `custom_mapping`: the CPU kernel that it does not count by itself."""


def prefill_flops(text: nn.Module, batch: int, tokens: int) -> int:
    """Floating-point operations of the language model's layers (no vocabulary projection) on `tokens` a row.

    Counted on the meta device, where tensors have shapes and no values, with torch's own counter.
    """
    from transformers import DynamicCache

    from vision_tokens.cutting import running_dense

    weights: dict[str, Tensor] = {name: tensor.detach().to("meta") for name, tensor in _tensors(text)}
    width = int(text.config.hidden_size)  # type: ignore[union-attr, arg-type]
    dtype = next(text.parameters()).dtype
    inputs = torch.empty(batch, tokens, width, device="meta", dtype=dtype)
    positions = torch.empty(batch, tokens, device="meta", dtype=torch.long)
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_RULES)
    with torch.no_grad(), running_dense(), counter:
        torch.func.functional_call(
            text,
            weights,
            kwargs={
                "inputs_embeds": inputs,
                "position_ids": positions,
                "past_key_values": DynamicCache(config=text.config),
                "use_cache": True,
            },
        )
    return int(counter.get_total_flops())


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
