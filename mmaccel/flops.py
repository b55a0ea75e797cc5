"""Floating-point operations of whatever runs, counted by torch as it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def attention_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *args: Any, **kw: Any) -> int:
    """Multiply-adds, doubled, of one scaled-dot-product attention, causal or not: both of its matrix products."""
    *batch, queries, width = query
    return 2 * math.prod(batch) * queries * key[-2] * (width + value[-1])


FLOP_RULES = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
"""For FlopCounterMode's `custom_mapping`: the CPU kernel that it does not count by itself."""


def count_flops(call: Callable[[], object]) -> int:
    """The floating-point operations of one call: matrix products, convolutions and attention, as torch counts them."""
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_RULES)
    with torch.no_grad(), counter:
        call()
    return int(counter.get_total_flops())
