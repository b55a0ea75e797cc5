"""The limit that a method is measured against: the bare language model, each layer on just the tokens that it kept.

The oracle pays the plain vision encoder and then runs the language model, prefill and greedy decoding, on embeddings
that it is handed, at the positions that they had.  Both sides run through transformers' own `generate`: the decorated
model as its user calls it, the oracle as the language model's own causal class with `inputs_embeds` and
`position_ids`.  The ratio of their times so measures mmaccel alone.  It is a strict limit: the oracle neither chooses
nor gathers tokens, nor embeds the text, and the wrapper of the multimodal model is not in its way.

Where a method lets go of tokens in the cache, the oracle's layers hold as few behind the prompt; each new token stays.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmaccel.api import report
from mmaccel.attachment import attached
from vision_tokens.cache_room import Room, gather_columns, held_places
from vision_tokens.families import find_host
from vision_tokens.families.facts import PIXELS
from vision_tokens.kept_columns import held_length, layer_columns, rows_of
from vision_tokens.layer_columns import taken


def twin(model: nn.Module) -> Any:
    """A second object with the same weights (shared, not copied) that can be decorated on its own."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@dataclass(frozen=True)
class Read:
    """What the language model reads in a prefill: embeddings [batch, held, width], their positions, their mask.

    layers: by layer, the places among them that it works on, where these are not all: [batch, places].
    caches: by layer, the places among these that stay in its keys and values once the prompt was read.
    """

    embeddings: Tensor
    positions: Tensor
    mask: Tensor | None
    layers: Mapping[int, Tensor] = field(default_factory=dict)
    caches: Mapping[int, Tensor] = field(default_factory=dict)


@torch.inference_mode()
def read_by(model: Any, inputs: Mapping[str, Tensor]) -> Read:
    """What reaches the language model when `model` reads this prompt, behind any method that is applied to it."""
    found: list[dict[str, Any]] = []
    handle = find_host(model).text.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(dict(kwargs)), with_kwargs=True
    )
    try:
        cache = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
        ).past_key_values
    finally:
        handle.remove()
    read = found[-1]  # behind a question that a method reads alone
    mask = read.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        mask = None  # a finished one costs the oracle nothing: `generate` takes none
    kept = report(model).details.get("layer_columns", {}) if attached(model) else {}
    layers = {layer: columns.index for layer, columns in kept.items()}
    return Read(read["inputs_embeds"], read["position_ids"], mask, layers, evicted(cache, layers))


def evicted(cache: Any, layers: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """`Read.caches` of a cache that a method has let go of tokens of; nothing of others."""
    if not isinstance(rows_of(cache), Room):
        return {}
    held = held_length(cache)
    kept = {layer: held_places(cache, layer, held) for layer in layer_columns(cache)}
    return {
        layer: torch.searchsorted(layers[layer], places) if layer in layers else places
        for layer, places in kept.items()
    }


class Oracle:
    """A plain model's language model on the tokens that a decorated twin of it reads for one prompt."""

    def __init__(self, plain: Any, read: Read) -> None:
        """plain: an undecorated model; its modules are used, not copied."""
        from transformers import AutoModelForCausalLM

        host = find_host(plain)
        causal: Any = plain  # Qwen2.5-VL's language model has no causal class of its own: its wrapper reads embeddings
        if type(host.text.config) in AutoModelForCausalLM._model_mapping:
            with torch.device("meta"):
                causal = AutoModelForCausalLM.from_config(host.text.config)
            setattr(causal, causal.base_model_prefix, host.text)
            causal.set_output_embeddings(plain.get_output_embeddings())
            causal.generation_config = copy.deepcopy(plain.generation_config)
        encoders = [getattr(host.multimodal, f"get_{kind}_features") for kind in host.tokens]
        self.encoders = [(PIXELS[kind], encode, set(inspect.signature(encode).parameters))
                         for kind, encode in zip(host.tokens, encoders, strict=True)]  # fmt: skip
        self.language_model, self.read = causal.eval(), read
        self.layers = host.decoder_layers
        self.narrowing = {layer: narrowing(places, read.layers.get(layer - 1)) for layer, places in read.layers.items()}
        if any(bool((places < 0).any()) for places in read.caches.values()):
            raise ValueError(
                "an oracle of caches whose rows hold different numbers of tokens needs masks; pass one row"
            )
        self.text = host.text

    @torch.inference_mode()
    def generate(self, inputs: Mapping[str, Tensor], **options: Any) -> Any:
        """Encodes the prompt's images and videos and generates.  inputs: the prompt as the plain model takes it."""
        for pixels, encode, names in self.encoders:
            if inputs.get(pixels) is not None:
                encode(**{name: tensor for name, tensor in inputs.items() if name in names}, return_dict=True)
        read = self.read
        mask = {} if read.mask is None else {"attention_mask": read.mask}
        with ExitStack() as undo:
            for layer, hook in self.narrowing.items():
                undo.callback(self.layers[layer].register_forward_pre_hook(hook, with_kwargs=True).remove)
            if read.caches:
                undo.callback(self.text.register_forward_hook(self._evict).remove)
            return self.language_model.generate(
                inputs_embeds=read.embeddings, position_ids=read.positions, **mask, **options
            )

    def _evict(self, text: nn.Module, args: Any, output: Any) -> None:
        """Behind the prompt, leaves in every layer's cache what stays there."""
        if output.last_hidden_state.shape[1] > 1:
            for layer, places in self.read.caches.items():
                gather_columns(output.past_key_values.layers[layer], places)


def narrowing(places: Tensor, before: Tensor | None) -> Callable[..., Any]:
    """A hook that hands a layer, in the prefill, the tokens at these places; `before` are those of the layer before."""
    if bool((places < 0).any()):
        raise ValueError("an oracle of layers that work on different tokens needs rows of one length; pass one row")
    local = places if before is None else torch.searchsorted(before, places)
    index = local[0]

    def narrow(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0]
        if hidden.shape[1] == 1:  # a step of decoding
            return None
        if len(index) < hidden.shape[1]:
            hidden = hidden.index_select(1, index)
        kwargs["position_embeddings"] = taken(kwargs["position_embeddings"], places, -2)
        kwargs["position_ids"] = taken(kwargs.get("position_ids"), places, -1)
        if (mask := kwargs.get("attention_mask")) is not None:
            kwargs["attention_mask"] = mask[..., places[0][:, None], places[0]]
        return (hidden, *args[1:]), kwargs

    return narrow
