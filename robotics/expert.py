"""The scripted expert: walk around the disc on a ring until behind it, and push; both in one smooth formula.

It sees where the disc, the square and the pusher are and nothing else, so what it does depends on six numbers alone:
any state can be labelled, those that a policy got into by mistake included, and the nearer two states are, the nearer
is what it does in them.  The one exception, which no way around a disc can avoid, is right in front of the disc.
Other discs it does not see; a task's are never in the way of the disc, and those in its own way it pushes aside.
"""

from __future__ import annotations

import numpy as np

from robotics.world import DISCS, PUSHER, REACH, Tabletop, Task, Vector, place

RING = 0.165  # radius of the circle around the disc's centre on which it walks
STIFFNESS = 8.0  # how firmly it keeps to the circle, against going along it, a unit of length
WIDTH = 1.0  # radians from its place behind the disc, seen from the disc, from which it does nothing but walk
CONTACT = (PUSHER + sum(DISCS) / 2) / 2  # distance of a pusher that touches a disc of middle size


def act(table: Tabletop, task: Task) -> Vector:
    """The next action: which way the pusher is to go, a unit vector."""
    return heading(*where(table, task))


def where(table: Tabletop, task: Task) -> tuple[Vector, Vector, Vector]:
    """Where the task's disc, its square and the pusher are."""
    return place(table.discs[task.disc]), place(table.squares[task.square]), place(table.pusher)


def heading(disc: Vector, square: Vector, pusher: Vector) -> Vector:
    """Which way the pusher is to go, a unit vector; all [..., 2]."""
    way, offset = unit(square - disc), pusher - disc
    outward = unit(offset)
    sideways = np.stack([-outward[..., 1], outward[..., 0]], axis=-1)
    to_go = np.arccos(np.clip(-dot(outward, way), -1, 1))  # radians, to its place behind the disc
    walk = np.minimum(to_go / WIDTH, 1)
    shorter = np.where(dot(sideways, way) < 0, sideways, -sideways)
    back = np.clip(STIFFNESS * (RING - np.sqrt(dot(offset, offset))), -1, 1)  # to the circle, outwards
    return unit(walk * (shorter + back * outward) - (1 - walk) * outward)


def chunk(disc: Vector, square: Vector, pusher: Vector, length: int) -> Vector:
    """What it does next if the disc goes just as far as it is pushed, and no wall stops it, [..., length, 2]."""
    actions = []
    for _ in range(length):
        actions.append(heading(disc, square, pusher))
        pusher = np.clip(pusher + REACH * actions[-1], PUSHER / 2, 1 - PUSHER / 2)
        offset = disc - pusher
        disc = pusher + np.maximum(np.sqrt(dot(offset, offset)), CONTACT) * unit(offset)
    return np.stack(actions, axis=-2)


def dot(one: Vector, other: Vector) -> Vector:
    """Of vectors along the last axis, which stays with length 1."""
    return np.asarray((one * other).sum(axis=-1, keepdims=True))


def unit(vector: Vector) -> Vector:
    """Of length 1 along the last axis; nothing stays nothing."""
    return np.asarray(vector / np.maximum(np.sqrt(dot(vector, vector)), 1e-9))
