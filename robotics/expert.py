"""The scripted expert: walk around the disc until behind it, then push it, straightening the course at every step.

It sees where things lie and nothing else, so what it does depends on the tabletop alone: any state can be labelled,
those that a policy got into by mistake included.
"""

from __future__ import annotations

import numpy as np

from robotics.world import Physics, Tabletop, Task, Vector, place

CLEARANCE = 0.025  # kept between the pusher and a disc on the way around it
AHEAD = 0.2  # how far before the point of contact the pusher aims while it pushes
ALIGNED = 0.8  # cosine of the angle, seen from the disc, between the pusher and its place, from which it pushes
TURN = 0.9  # radians that it goes along a circle at least, so that it never stands still


def act(table: Tabletop, task: Task) -> Vector:
    """The next action: where the pusher is to go, (-1, -1) to (1, 1)."""
    pusher, disc = place(table.pusher), place(table.discs[task.disc])
    way = _unit(place(table.squares[task.square]) - disc)
    contact = (table.pusher.size + table.discs[task.disc].size) / 2
    offset = pusher - disc
    if _unit(offset) @ -way > ALIGNED and np.hypot(*offset) < contact + 2 * CLEARANCE:
        target = disc - (contact - AHEAD) * way
    else:
        target = disc - (contact + CLEARANCE) * way
        for obstacle in sorted(table.discs, key=lambda other: float(np.hypot(*(place(other) - pusher)))):
            radius = (table.pusher.size + obstacle.size) / 2 + 0.8 * CLEARANCE
            target = around(pusher, target, place(obstacle), radius)
    return np.asarray(np.clip(2 * target - 1, -1, 1))


def _unit(vector: Vector) -> Vector:
    return np.asarray(vector / max(float(np.hypot(*vector)), 1e-9))


def around(start: Vector, target: Vector, centre: Vector, radius: float) -> Vector:
    """The target, or, where a circle lies between, a point on it to go to first, on the shorter side.

    The point where the tangent from `start` touches; from near the circle, one further along it.
    """
    way, offset = target - start, start - centre
    length, distance = float(np.hypot(*way)), float(np.hypot(*offset))
    along = float(-offset @ way) / max(length, 1e-9)
    if not 0 < along < length or np.hypot(*(offset + along * _unit(way))) >= radius:
        return target
    outward = _unit(offset)
    sideways = (np.sign(offset[0] * way[1] - offset[1] * way[0]) or 1.0) * np.array([-outward[1], outward[0]])
    angle = max(np.arccos(min(radius / distance, 1.0)), TURN)
    return np.asarray(centre + radius * (np.cos(angle) * outward + np.sin(angle) * sideways))


def chunk(table: Tabletop, task: Task, length: int) -> Vector:
    """What the expert does next from here, [length, 2]."""
    physics, actions = Physics(table), []
    for _ in range(length):
        actions.append(act(physics.table, task))
        physics.step(actions[-1])
    return np.stack(actions)
