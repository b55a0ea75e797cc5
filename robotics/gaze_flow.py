"""VLA-Pruner on pi0: the prompt's tokens go inside the vision-language model, and its expert reads what is left.

The expert reads the same key-value cache, layer by layer; behind the cut it finds fewer columns there, once for all
denoising steps.  The cache goes on counting original tokens (`vision_tokens.kept_columns`), so that state and actions
keep their positions, and each of the expert's layers gets a mask for the columns that it has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mmaccel.methods import Unsupported
from robotics.episodes import forget_at_reset
from robotics.gaze import ActionReader, GazeCutter, Gazes
from robotics.vla_pruner import VLAPruner
from vision_tokens.families import find_host
from vision_tokens.inside import InsideMechanism
from vision_tokens.layer_columns import LayerColumns, Run
from vision_tokens.layer_cutting import LayerCutter
from vision_tokens.prompts import set_visual_places

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment

Prefix = tuple[Bool[Tensor, "batch tokens"], Bool[Tensor, "batch cameras"]]
_prefix: ContextVar[Prefix | None] = ContextVar("prefix", default=None)


class Prefixed(InsideMechanism):
    """For a language model that gets finished embeddings: pi0's `embed_prefix` says where the visual ones are."""

    def note(self, model: Any) -> None:
        """Notes what `embed_prefix` embeds."""
        embed = noting(model.model.embed_prefix, self.host.tokens["image"])
        self.attachment.set_attribute(model.model, "embed_prefix", embed)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds the visual tokens of a prompt and starts the report of its call."""
        super().begin(module, args, kwargs)
        prefix = _prefix.get()
        set_visual_places(None if prefix is None else prefix[0])

    def end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forgets the call, also when it raised."""
        super().end(module, args, kwargs, output)
        _prefix.set(None)


class PrefixCutter(Prefixed, GazeCutter):
    """The cut in front of pi0's expert."""

    def shown(self) -> Bool[Tensor, "batch cameras"] | None:
        """Which cameras are no padding."""
        prefix = _prefix.get()
        return None if prefix is None else prefix[1]


def noting(embed: Callable[..., Tensor], token: int) -> Callable[..., Tensor]:
    """`embed_prefix`, noting which of its tokens show which camera."""

    @functools.wraps(embed)
    def noted(
        input_ids: Tensor, pixel_values: Tensor, pixel_attention_mask: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        embedded = embed(input_ids, pixel_values, pixel_attention_mask, attention_mask)
        _prefix.set((input_ids == token, pixel_attention_mask.bool()))
        return embedded

    return noted


def suffix_actions(run: Run, kwargs: Mapping[str, Any]) -> Int[Tensor, "batch actions"]:
    """The expert's tokens behind the state's."""
    return torch.arange(1, run.new, device=run.device).expand(run.batch, -1)


def attach_to_pi0(method: VLAPruner, model: Any, attachment: Attachment) -> None:
    """Decorates transformers' pi0."""
    host = find_host(model)
    if method.keeps_all:
        LayerCutter(method, host, attachment).attach(model)
        return
    if method.positions != "kept":
        raise Unsupported(f"{method.name}: pi0 numbers its actions behind the whole prompt; use positions='kept'")
    expert = replace(host, text=model.model.dit)
    gazes, layers = Gazes(), list(method.action_layers(len(host.decoder_layers)))
    cutter = PrefixCutter(method, host, attachment, gazes)
    cutter.attach(model)
    cutter.note(model)
    LayerColumns.of(expert, attachment)
    ActionReader(gazes, expert, layers, suffix_actions).attach(attachment)
    forget_at_reset(attachment, gazes)
