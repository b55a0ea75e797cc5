"""What a policy is shown at one control step, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool
from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """One control step of a vectorised environment.

    images: by camera, [rows, 3, height, width], floats in 0..1.  state: the robot's own, in its own units,
        [rows, numbers].  instruction: one a row.
    padded: by camera, [rows], whether it shows nothing in a row and its picture is only filled in; cameras that are
        not named show something in every row.
    rows: which of the environment's rows these are; None says all of them.
    """

    images: Mapping[str, Tensor]
    state: Tensor | None = None
    instruction: Sequence[str] = ()
    padded: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Sequence[int] | None = None

    @property
    def count(self) -> int:
        """The number of rows."""
        if self.images:
            return len(next(iter(self.images.values())))
        return len(self.instruction) if self.state is None else len(self.state)

    def only(self, places: Sequence[int]) -> Observation:
        """Some of the rows, by their place in this observation."""
        numbers = range(self.count) if self.rows is None else self.rows
        return replace(
            self,
            images={name: picture[list(places)] for name, picture in self.images.items()},
            state=None if self.state is None else self.state[list(places)],
            instruction=[self.instruction[place] for place in places] if self.instruction else (),
            padded={name: rows[list(places)] for name, rows in self.padded.items()},
            rows=[numbers[place] for place in places],
        )

    def shown(self, cameras: Sequence[str]) -> Bool[Tensor, "rows cameras"]:
        """Which cameras show something."""
        whole = torch.ones(self.count, dtype=torch.bool)
        return torch.stack([whole & ~self.padded.get(name, ~whole).cpu() for name in cameras], dim=-1)

    def check(self, cameras: Sequence[str], pads: bool) -> None:
        """Raises ValueError for what no policy should act on.

        cameras: those that the policy reads.  pads: whether it can go without some of them.
        """
        for name in cameras:
            if name not in self.images:
                raise ValueError(
                    f"the policy reads the cameras {', '.join(cameras)}, and the observation lacks {name!r} (it has "
                    f"{', '.join(self.images) or 'none'}); "
                    + ("if the robot has no such camera, pass zeros and name it in padded" if pads else "pass it")
                )
            if self.images[name].dim() != 4 or self.images[name].shape[1] != 3:
                raise ValueError(
                    f"pictures are [rows, 3, height, width]; camera {name!r} has {list(self.images[name].shape)}"
                )
            self._check_numbers(f"camera {name!r}", self.images[name])
        if unknown := [name for name in self.padded if name not in cameras]:
            raise ValueError(f"padded names {unknown[0]!r}, which is none of the cameras {', '.join(cameras)}")
        if not pads and not bool(self.shown(cameras).all()):
            raise ValueError(
                "this policy has no way to go without a camera, and the observation has padded ones; show it all of "
                f"{', '.join(cameras)}"
            )
        if not bool(self.shown(cameras).any(dim=-1).all()):
            raise ValueError("every camera of a row is padded, so there is nothing to act on; show at least one")
        if self.state is not None:
            self._check_numbers("state", self.state)
        sizes = {f"camera {name!r}": len(picture) for name, picture in self.images.items()}
        sizes |= {} if self.state is None else {"state": len(self.state)}
        sizes |= {"instruction": len(self.instruction)} if self.instruction else {}
        sizes |= {} if self.rows is None else {"rows": len(self.rows)}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                "all parts of an observation have one entry a row; got "
                + ", ".join(f"{size} of {name}" for name, size in sizes.items())
            )

    @staticmethod
    def _check_numbers(name: str, values: Tensor) -> None:
        if not values.is_floating_point():
            raise ValueError(f"the {name} holds {values.dtype}; pass floats, pictures in 0..1 (divide bytes by 255)")
        if not bool(values.isfinite().all()):
            row = int((~values.isfinite()).flatten(1).any(dim=-1).nonzero()[0])
            raise ValueError(
                f"the {name} holds NaN or infinite numbers in row {row}, and a policy would act on them; mend the "
                "reading, or show the last good one again"
            )
