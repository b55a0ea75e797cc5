"""Feeding a policy's chunks to the robot, one action after the other, every row at its own pace."""

from __future__ import annotations

from collections import Counter, deque

import torch
from jaxtyping import Float
from torch import Tensor

from robotics.episodes import Rows
from robotics.observations import Observation
from robotics.policies import Chunk, Policy


class Controller:
    """Asks the policy for a new chunk when a row has executed the last one, or its instruction changed.

    calls: how often the policy was asked, in batches.  asked: how often for each row, ever.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.calls, self.asked = 0, Counter[int]()
        self._queues: dict[int, deque[Tensor]] = {}
        self._words: dict[int, str] = {}

    def reset(self, rows: Rows = None) -> None:
        """Begins new episodes, of some rows or of all."""
        self.policy.reset(rows)
        for row in list(self._queues) if rows is None else rows:
            self._queues.pop(row, None)
            self._words.pop(row, None)

    def step(self, observation: Observation, generator: torch.Generator | None = None) -> Float[Tensor, "rows dims"]:
        """The next action of every row."""
        rows = list(range(observation.count) if observation.rows is None else observation.rows)
        words = list(observation.instruction) or [""] * len(rows)
        waiting = [
            place for place, row in enumerate(rows) if not self._queues.get(row) or self._words.get(row) != words[place]
        ]
        if waiting:
            chunk = self._ask(observation if len(waiting) == len(rows) else observation.only(waiting), generator)
            self.asked.update(rows[place] for place in waiting)
            for number, place in enumerate(waiting):
                self._queues[rows[place]] = deque(chunk.actions[number, : int(chunk.execute[number])])
                self._words[rows[place]] = words[place]
        return torch.stack([self._queues[row].popleft() for row in rows])

    def _ask(self, observation: Observation, generator: torch.Generator | None) -> Chunk:
        chunk = self.policy.act(self.policy.observe(observation), generator)
        self.calls += 1
        return chunk
