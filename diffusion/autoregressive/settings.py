"""How a run samples: what the law of an image depends on beside model and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Sampling:
    """Settings of `generate`.

    guidance: how far to go from the unconditional prediction towards, and past, the conditional one; 1 is without.
    guidance_schedule: "linear" rises to it over the image, "constant" does not.
    temperature: multiplies every standard deviation, and lies above 0.
    steps: in how many steps a masked model draws its tokens; None is one token a step, the only way of causal models.
    diffusion_steps: of a diffusion head, a token; None is what the configuration says.
    """

    guidance: float = 1.0
    guidance_schedule: Literal["linear", "constant"] = "linear"
    temperature: float = 1.0
    steps: int | None = None
    diffusion_steps: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature lies above 0; got {self.temperature!r}: at 0 a token has no density, and all images of a "
                "label would be one. For less variety pass a small one, such as 0.5"
            )
        if self.guidance_schedule not in ("linear", "constant"):
            raise ValueError(f"guidance_schedule is 'linear' or 'constant'; got {self.guidance_schedule!r}")
