"""The mechanism of methods that merge tokens inside the vision encoder: really fewer of them, block after block.

An encoder of plain pre-norm blocks (CLIP's, SigLIP's, Idefics3's) gets blocks that merge between attention and MLP.
Behind the encoder every patch is a copy of the token that it merged into, so that the model finds as many as it
expects; `vision_tokens.encoding` is told which are copies, and the language model reads each token once.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmaccel.attachment import Attachment
from mmaccel.flops import count_flops
from mmaccel.methods import Unsupported
from mmaccel.reports import Quantity
from mmaccel.scoped import within
from vision_tokens.attention_rows import PREFIX, listen, mean_keys, recording, settle
from vision_tokens.encoding import is_running_dense, note_figure, note_grouping, note_merged, note_merging
from vision_tokens.families import Host
from vision_tokens.matching import Grouping, match, merge, unmerge

PARTS = {"layer_norm1", "self_attn", "layer_norm2", "mlp"}
"""What a block consists of: x + attention(norm(x)), then x + mlp(norm(x))."""

Counts = Callable[[int], list[int]]
"""For a number of patches, how many tokens each block merges away."""


@dataclass
class Forward:
    """One forward of the encoder: what its tokens stand for by now, and what they stood for behind each block."""

    into: Int[Tensor, "pictures tokens"] | None = None
    sizes: Float[Tensor, "pictures left"] | None = None
    counts: list[int] = field(default_factory=list)
    history: list[Int[Tensor, "pictures tokens"]] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Tokens of each picture by now, special ones included."""
        assert self.into is not None
        return self.into.shape[1] - sum(self.counts)

    def bias(self, dtype: torch.dtype) -> Float[Tensor, "pictures 1 1 left"] | None:
        """Proportional attention: the logarithm of its size is added to each key's logits (ToMe, equation 1)."""
        return None if self.sizes is None else self.sizes.log().to(dtype)[:, None, None]


_forward: ContextVar[Forward | None] = ContextVar("forward", default=None)


class EncoderMerging:
    """The hooks on one vision encoder.  Holds facts about the model only."""

    def __init__(self, name: str, host: Host, counts: Counts, proportional: bool) -> None:
        """name: of the method, for errors.  counts: for the blocks up to the one whose output is read."""
        self.name, self.host, self.counts, self.proportional = name, host, counts, proportional
        self.protected = int(host.has_class_token)
        attention = host.attention_modules
        self.blocks: list[Any] = [
            block for block in host.tower.modules() if any(block._modules.get("self_attn") is own for own in attention)
        ]
        self._refuse_other_encoders()

    def _refuse_other_encoders(self) -> None:
        config: Any = self.host.tower.config
        kind, kernel = config.model_type, str(config._attn_implementation).removeprefix(PREFIX)
        if getattr(config, "window_size", None):
            raise Unsupported(
                f"{self.name} cannot merge inside the encoder {kind!r}: its windows are fixed runs of patches, and its "
                "positions are rotations of them; use a method that acts on the language input, e.g. VisionZip"
            )
        if not self.blocks or any({*block._modules} != PARTS or block._parameters for block in self.blocks):
            raise Unsupported(
                f"{self.name} merges between the attention and the MLP of plain pre-norm blocks, as CLIP, SigLIP and "
                f"Idefics3 have them; the encoder {kind!r} has other ones. Use a method that acts on the language input"
            )
        if self.proportional and kernel not in ("eager", "sdpa"):
            raise Unsupported(
                f"{self.name} adds the logarithms of sizes to attention logits, which the kernel {kernel!r} cannot; "
                "load the encoder with attn_implementation='sdpa', or pass proportional=False"
            )
        if not isinstance(layers := getattr(self.host.multimodal.config, "vision_feature_layer", -1), int):
            raise Unsupported(
                f"{self.name} shortens the encoder block by block, and this model reads several of them ({layers}); "
                "use a method that acts on the language input"
            )

    def attach(self, attachment: Attachment) -> None:
        """Registers the hooks and the blocks' forwards."""
        listen(attachment, [block.self_attn for block in self.blocks])
        attachment.pre_hook(self.host.tower, self.begin)
        attachment.hook(self.host.tower, self.end)
        for number, block in enumerate(self.blocks):
            forward = functools.partial(self.forward, number, block, block.forward)
            attachment.set_attribute(block, "forward", functools.wraps(block.forward)(forward))

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward of the encoder starts."""
        _forward.set(None if is_running_dense() else Forward())
        if any(block.training and block.gradient_checkpointing for block in self.blocks):
            raise Unsupported(f"{self.name} does inference: switch gradient checkpointing off, or call model.eval()")

    def forward(
        self,
        number: int,
        block: Any,
        plain: Callable[..., Any],
        hidden: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """A block's forward, with fewer tokens behind its attention."""
        state = _forward.get()
        if state is None:
            return plain(hidden, attention_mask, **kwargs)
        if attention_mask is not None and not _shows_all(attention_mask):
            raise Unsupported(
                f"{self.name} would merge padding into pictures: this encoder masks some of its patches. Pass pictures "
                "of the encoder's full size"
            )
        if state.into is None:
            state.into = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
            state.counts = self.counts(hidden.shape[1] - self.protected)
        bias = state.bias(hidden.dtype) if self.proportional else None
        if state.sizes is not None:
            note_grouping(block.self_attn, self._of_patches(state.into, state.sizes))
        with recording({block.self_attn: mean_keys}) as keys:
            hidden = hidden + block.self_attn(block.layer_norm1(hidden), attention_mask=bias, **kwargs)[0]
        if number < len(state.counts) and state.counts[number]:
            settle(hidden.device)
            start = time.perf_counter()
            matching = match(keys[block.self_attn][0].mT, state.counts[number], self.protected)
            hidden, state.sizes = merge(hidden, matching, state.sizes)
            state.into = matching.into.gather(1, state.into)
            settle(hidden.device)
            note_merging(time.perf_counter() - start + keys.seconds)
        state.history.append(state.into)
        return hidden + block.mlp(block.layer_norm2(hidden))

    def _of_patches(self, into: Tensor, sizes: Tensor) -> Grouping:
        return Grouping(into[:, self.protected :] - self.protected, sizes[:, self.protected :])

    def end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Gives every patch a copy of its token, in all that the encoder returns; forgets the forward."""
        state = _forward.get()
        _forward.set(None)
        if state is None or output is None or state.into is None:
            return
        if isinstance(output, tuple):
            raise Unsupported(f"{self.name} needs the encoder's outputs by name; call it with return_dict=True")
        output.last_hidden_state = unmerge(output.last_hidden_state, state.into)
        if output.get("hidden_states") is not None:
            first, *behind = output.hidden_states
            pairs = zip(behind, state.history, strict=True)
            output.hidden_states = (first, *(own if own is None else unmerge(own, into) for own, into in pairs))
        note_merged(state.into[:, self.protected :] - self.protected)
        pictures, tokens = state.into.shape
        note_figure("encoder_tokens", Quantity(state.left, tokens, "tokens a picture"))
        flops = functools.partial(self._flops, pictures, tokens)
        note_figure("encoder_flops", Quantity(functools.partial(flops, True), functools.partial(flops, False), "FLOP"))

    def _flops(self, pictures: int, tokens: int, merging: bool) -> int:
        """Floating-point operations of the blocks, counted on twins on the meta device."""
        config = copy.deepcopy(self.host.tower.config)
        config._attn_implementation = "sdpa"  # type: ignore[union-attr]
        with within(_forward, Forward() if merging else None), torch.no_grad(), torch.device("meta"):
            blocks = [type(block)(config) for block in self.blocks]
            hidden = torch.empty(pictures, tokens, blocks[0].embed_dim)
            listen(Attachment(None, ()), [block.self_attn for block in blocks])
            return count_flops(lambda: self._run(blocks, hidden))

    def _run(self, blocks: list[Any], hidden: Tensor) -> None:
        for number, block in enumerate(blocks):
            hidden = self.forward(number, block, block.forward, hidden)


def _shows_all(mask: Tensor) -> bool:
    return bool((mask if mask.dtype == torch.bool else mask == 0).all())
