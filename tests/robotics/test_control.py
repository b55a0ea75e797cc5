"""Chunks reach the robot one action after the other, each row at its own pace."""

import torch

from mmaccel.methods import Unsupported
from robotics import Chunk, Controller, Inputs, Places, Policy
from tests.robotics.tiny import observation


class Counting(Policy):
    """Says in every action when it was made, for which row, and which of the chunk it is; row r executes 2 + r."""

    made = 0

    def __init__(self):
        super().__init__(torch.nn.Identity(), lambda seen: {}, cameras=("top",), dims=3, horizon=8)

    def decide(self, inputs, noise):
        self.made += 1
        own = [[[self.made, row, step] for step in range(8)] for row in inputs.rows]
        return torch.tensor(own).float()

    def act(self, inputs, generator=None, noise=None):
        chunk = super().act(inputs, generator, noise)
        return Chunk(chunk.actions, torch.tensor([2 + row for row in inputs.rows]))

    def places(self, inputs: Inputs) -> Places:
        raise Unsupported("counting takes no tokens")


def test_a_row_is_planned_again_when_its_actions_are_done():
    control = Controller(Counting())
    control.reset()
    seen = [control.step(observation(2, cameras=("top",))).tolist() for _ in range(5)]
    assert [row[0] for row in seen] == [[1, 0, 0], [1, 0, 1], [2, 0, 0], [2, 0, 1], [4, 0, 0]]
    assert [row[1] for row in seen] == [[1, 1, 0], [1, 1, 1], [1, 1, 2], [3, 1, 0], [3, 1, 1]]
    assert (control.calls, control.asked.total()) == (4, 5)


def test_another_instruction_and_a_new_episode_drop_what_was_planned():
    control = Controller(Counting())
    control.reset()
    control.step(observation(2, cameras=("top",)))
    second = control.step(observation(2, cameras=("top",), instruction=["push disc 0", "stop"]))
    assert second.tolist() == [[1, 0, 1], [2, 1, 0]]
    control.reset([1])
    assert control.step(observation(2, cameras=("top",), instruction=["push disc 0", "stop"]))[1].tolist() == [3, 1, 0]
