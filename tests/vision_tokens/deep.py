"""The tiny models with a decoder deep enough to cut several times."""

from functools import cache
from unittest.mock import patch

from torch import nn

from tests.vision_tokens import tiny

LAYERS = 6


@cache
def build_deep(family: str, attention: str = "sdpa", seed: int = 0, layers: int = LAYERS) -> nn.Module:
    """A model of the family with seeded random weights and so many decoder layers."""
    with patch.dict(tiny.TEXT, num_hidden_layers=layers):
        return tiny.build.__wrapped__(family, attention, seed)
