"""What `mmaccel bench ar` compares: methods by short names, and a masked model for the published mode."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diffusion.autoregressive.configuration import MARConfig
from diffusion.autoregressive.jacobi import SpeculativeJacobi
from diffusion.autoregressive.modeling import MARModel
from diffusion.autoregressive.painters import ContinuousPainter, DiscretePainter, Painter
from diffusion.autoregressive.speculation import ContinuousSpeculation
from diffusion.autoregressive.zipar import ZipAR
from mmaccel.methods import Method

SIDE_BY_SIDE = {"zipar": {"adaptive": False}, "zipar-adaptive": {"adaptive": True}}
"""Kinds of settings for models of discrete tokens that are ZipAR's; all others are redraws of speculative Jacobi."""


def methods(painter: Painter, names: Sequence[str], prefill: float) -> dict[str, Method]:
    """The methods of these settings.  Raises ValueError for names that are none."""
    return {name: method(painter, name, prefill) for name in names}


def method(painter: Painter, name: str, prefill: float = 0.05) -> Method:
    """MODE.LENGTH, e.g. "exact.4" or "exact.adaptive", of a model of continuous tokens.

    Of the others: REDRAW.WINDOW, e.g. "coupled.16", or, not lossless, "zipar.WINDOW" or "zipar-adaptive.WINDOW".
    """
    kind, _, number = name.partition(".")
    length: Any = int(number) if number.isdecimal() else number
    try:
        if isinstance(painter, DiscretePainter) and kind in SIDE_BY_SIDE:
            return ZipAR.from_dict({**SIDE_BY_SIDE[kind], "window": length})
        if isinstance(painter, DiscretePainter):
            return SpeculativeJacobi.from_dict({**painter.speculation.to_dict(), "redraw": kind, "window": length})
        assert isinstance(painter, ContinuousPainter)
        _ = painter.speculation  # says what is missing if there is no draft
        return ContinuousSpeculation.from_dict(
            {"draft": painter.draft, "mode": kind, "length": length, "prefill": prefill}
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            "a setting is MODE.LENGTH (exact.4, exact.adaptive), REDRAW.WINDOW (coupled.16) or zipar.WINDOW; got "
            f"{name!r}: {error}"
        ) from None


def masked(painter: Painter) -> ContinuousPainter:
    """The painter itself if its model is masked; else one with random weights of the same sizes, and a draft's.

    Raises ValueError for models of discrete tokens.
    """
    if not isinstance(painter, ContinuousPainter) or painter.draft is None:
        raise ValueError("the published mode drafts continuous tokens; give a MARModel with its draft")
    if painter.model.config.attention == "masked":
        return painter
    target, draft = (stand_in(part.config, seed) for seed, part in enumerate((painter.model, painter.draft)))
    return ContinuousPainter(target, draft, None)


def stand_in(config: MARConfig, seed: int) -> MARModel:
    """A masked model of a causal one's width and depth, half of it encoder, with random weights.

    As published, its last denoising step draws no noise.
    """
    layers = int(config.encoder_layers)
    changed = copy.deepcopy(config)
    changed.attention, changed.noisy_end = "masked", False
    changed.encoder_layers, changed.decoder_layers = layers - layers // 2, max(1, layers // 2)
    changed.buffer_tokens = int(config.grid)
    torch.manual_seed(seed)
    model: Any = MARModel(changed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    return model.eval()  # type: ignore[no-any-return]
