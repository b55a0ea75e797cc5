"""What a prefill of the language model costs, counted by running its shapes, not its numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmaccel.flops import count_flops

if TYPE_CHECKING:
    from vision_tokens.cache_methods import CacheMethod
    from vision_tokens.decoder_layers import DecoderMethod
    from vision_tokens.layer_view import LayerView


def prefill_flops(
    text: nn.Module,
    batch: int,
    tokens: int,
    widths: Sequence[int] | None = None,
    change: Callable[[int, nn.Module], None] | None = None,
) -> int:
    """Floating-point operations of the language model's layers (no vocabulary projection) on `tokens` a row.

    widths: tokens a row by layer, where later layers work on fewer.  change: what else is done to each of the twin's
    layers.

    Counted with torch's own counter on a twin on the meta device, where tensors have shapes and no values, built from
    the model's configuration: other threads may be running the model itself, whose adapters and quantisation, if any,
    are left out of the count.
    """
    from transformers import DynamicCache

    config: Any = copy.deepcopy(text.config)
    config._attn_implementation = "sdpa" if text._supports_sdpa else "eager"  # the same products
    with torch.no_grad(), torch.device("meta"):
        twin = type(text)(config).to(next(text.parameters()).dtype)
        inputs = torch.empty(batch, tokens, int(config.hidden_size), dtype=next(twin.parameters()).dtype)
        positions = torch.empty(batch, tokens, dtype=torch.long)
        cache = DynamicCache(config=config)
        for layer, width in zip(twin.layers, widths or (), strict=False):  # type: ignore[arg-type]
            layer.register_forward_pre_hook(partial(_narrow, width), with_kwargs=True)
        for number, layer in enumerate(twin.layers if change is not None else ()):  # type: ignore[arg-type]
            change(number, layer)  # type: ignore[misc]
        return count_flops(lambda: twin(inputs_embeds=inputs, position_ids=positions, past_key_values=cache))


def _narrow(width: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gives a layer the first `width` tokens."""

    def first(value: Any, dimension: int) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(first(part, dimension) for part in value)
        return value.narrow(dimension, 0, width) if isinstance(value, Tensor) else value

    if isinstance(kwargs.get("attention_mask"), Tensor):
        kwargs["attention_mask"] = kwargs["attention_mask"][..., :width, :width]
    kwargs["position_embeddings"] = first(kwargs.get("position_embeddings"), -2)
    kwargs["position_ids"] = first(kwargs.get("position_ids"), -1)
    return (first(args[0], -2), *args[1:]), kwargs


def selection_flops(text: nn.Module, method: DecoderMethod, views: Mapping[int, LayerView]) -> int:
    """Floating-point operations of ranking the tokens at each cut, from the shapes of what was ranked.

    A method that looks ahead pays the query, key and value projections of the layer at the cut a second time.
    """
    total = scoring_flops(method, views)
    if method.scored_in == "the layer itself":
        config: Any = text.config
        for view in views.values():
            batch, heads, tokens, width = view.query.shape
            total += 2 * batch * tokens * int(config.hidden_size) * (heads + 2 * view.key.shape[1]) * width
    return total


def prediction_flops(predictor: nn.Module, shapes: Iterable[torch.Size]) -> int:
    """Floating-point operations of a predictor on hidden states of these shapes."""
    twin = copy.deepcopy(predictor).to("meta")
    with torch.no_grad():
        return count_flops(lambda: [twin(torch.empty(shape, device="meta")) for shape in shapes])


def scoring_flops(method: DecoderMethod | CacheMethod, views: Mapping[int, LayerView]) -> int:
    """Floating-point operations of scoring tokens, from the shapes of what was scored."""
    with torch.device("meta"):
        return count_flops(lambda: [method.score(view) for view in views.values()])
