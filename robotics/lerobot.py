"""lerobot's policies, through their public interface; lerobot itself is not needed.

lerobot's pins exclude today's torch and transformers, so its policies run where its own environment does; here they
are known by what they offer: `reset`, `predict_action_chunk(batch)`, and a configuration with `chunk_size` and
`n_action_steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmaccel.methods import Unsupported
from robotics.episodes import Rows
from robotics.observations import Observation
from robotics.policies import Inputs, Places, Policy, same

Batch = dict[str, Any]


class LerobotPolicy(Policy):
    """A lerobot policy with a `predict_action_chunk`.

    before, after: lerobot's pre- and post-processor (tokens, normalisation; units); by default none.
    Methods that act on chunks can decorate it; those that act on tokens need a model that they know inside it.
    """

    stochastic = True

    def __init__(
        self,
        policy: Any,
        *,
        cameras: tuple[str, ...],
        dims: int,
        before: Callable[[Batch], Mapping[str, Any]] = dict,
        after: Callable[[Tensor], Tensor] = same,
    ) -> None:
        config = getattr(policy, "config", None)
        lacking = [name for name in ("reset", "predict_action_chunk") if not callable(getattr(policy, name, None))]
        lacking += [f"config.{name}" for name in ("chunk_size", "n_action_steps") if not hasattr(config, name)]
        if lacking:
            raise Unsupported(
                f"a lerobot policy with chunks has reset, predict_action_chunk, config.chunk_size and "
                f"config.n_action_steps; {type(policy).__name__} lacks {', '.join(lacking)}"
            )
        chunk, executed = int(config.chunk_size), int(config.n_action_steps)  # type: ignore[union-attr]
        super().__init__(policy, self._batch, cameras=cameras, dims=dims, horizon=chunk, execute=executed)
        self.before, self.after = before, after

    def reset(self, rows: Rows = None) -> None:
        """Begins new episodes.  Raises `Unsupported` for some rows only, if the policy remembers observations."""
        seen = getattr(self.model.config, "n_obs_steps", 1)
        if rows is not None and seen != 1:
            raise Unsupported(
                f"this {type(self.model).__name__} remembers {seen} observations and forgets all rows at once; begin "
                "the episodes of all rows together: policy.reset()"
            )
        super().reset(rows)
        if rows is None:
            self.model.reset()  # type: ignore[operator]

    def _batch(self, observation: Observation) -> Mapping[str, Any]:
        batch: Batch = {f"observation.images.{name}": observation.images[name].clone() for name in self.cameras}
        if observation.state is not None:
            batch["observation.state"] = observation.state.clone()
        if observation.instruction:
            batch["task"] = list(observation.instruction)
        return self.before(batch)

    def draw(self, inputs: Inputs, samples: int, generator: torch.Generator | None) -> Tensor:
        seeds = torch.randint(2**31, (samples,), generator=generator, device=generator.device if generator else None)
        return seeds.expand(len(inputs.rows), -1)

    def decide(self, inputs: Inputs, noise: Tensor | None) -> Float[Tensor, "rows horizon dims"]:
        """noise: one seed a row, all the same; lerobot's policies draw from torch's own generators."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            if noise is not None:
                torch.manual_seed(int(noise[0]))
            actions: Tensor = self.model.predict_action_chunk(dict(inputs.model))  # type: ignore[operator]
        return self.after(actions)[..., : self.dims]

    def places(self, inputs: Inputs) -> Places:
        raise Unsupported(
            f"where the tokens of a lerobot {type(self.model).__name__} sit is not known; methods that act on chunks "
            "work: horizon-consensus, sample-consensus, fixed-horizon, temporal-ensembling"
        )
