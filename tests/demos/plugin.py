"""A method as somebody else's package would bring it."""

from dataclasses import dataclass
from typing import ClassVar

from vision_tokens.baselines import UniformTokens


@dataclass(frozen=True, kw_only=True)
class Centre(UniformTokens):
    """Keeps what UniformTokens keeps; brings one setting more."""

    name: ClassVar[str] = "centre"

    rings: int = 3
