"""What a search leaves behind: its report, and finalists that can be made again, alone, from their seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffusion.particles import Move, Particles, Trail
from diffusion.problem import Problem
from mmaccel.reports import Report

if TYPE_CHECKING:
    from diffusion.host import PipelineHost


def record(report: Report, problems: Sequence[Problem], finalists: Sequence[Particles | None]) -> None:
    """Writes the report of a call: sums over its samples, and the search of each sample.

    finalists: of each sample, None where the search was stopped: the best so far stands for them.
    """
    spent = {name: sum(problem.ledger.spent.get(name, 0) for problem in problems) for name in SPENT}
    plain = sum(problem.host.rows_per_evaluation * problem.steps for problem in problems)
    report.record("denoiser_rows", spent["denoiser_rows"], plain)
    report.record("decodes", spent["decodes"])
    report.record("reward_calls", spent["reward_calls"])
    hosts: list[Any] = [problem.host for problem in problems]
    report.record("invalid_rewards", sum(host.invalid_rewards for host in hosts))
    for name in SPENT:
        report.seconds[name] = sum(problem.ledger.seconds.get(name, 0.0) for problem in problems)
    searches = [_search(problem, found) for problem, found in zip(problems, finalists, strict=False)]
    report.facts["searches"] = searches
    if searches:
        report.record("reward", max(search["reward"] for search in searches))
        report.record("distinct_ancestors", min(search["distinct_ancestors"] for search in searches))
        report.facts |= {name: searches[0][name] for name in ("reward_trace", "finalists", "stopped")}


SPENT = ("denoiser_rows", "decodes", "reward_calls")


def _search(problem: Problem, finalists: Particles | None) -> dict[str, Any]:
    """One sample's search as plain data."""
    host: Any = problem.host
    if finalists is not None:
        rewards = [] if finalists.reward is None else finalists.reward.tolist()
        rows = list(zip(rewards, finalists.trails, strict=True))
    else:
        rows = [] if problem.best_trail is None else [(problem.best_reward, problem.best_trail)]
    return {
        "seed": host.seed,
        "prompt": host.prompt,
        "reward": rows[0][0] if rows else float("-inf"),
        "distinct_ancestors": len({trail.chain for _, trail in rows}),
        "reward_trace": [list(point) for point in problem.trace],
        "rows_per_call": problem.rows_per_call,
        "stopped": finalists is None,
        "finalists": [finalist(reward, trail, host) for reward, trail in rows],
    }


def finalist(reward: float, trail: Trail, host: PipelineHost) -> dict[str, Any]:
    """A finalist as plain data.

    seed: the plain pipeline, called with a generator of this seed, starts from the same noise; if `plain`, it also ends
    with the same sample.  trail: what `Replay` needs to make the sample again without the search.
    """
    return {
        "reward": reward,
        "seed": host.seed_of_chain(trail.chain),
        "plain": trail.sampled and not trail.turns,
        "trail": {"seed": host.seed, **dataclasses.asdict(trail), "moves": [list(move) for move in trail.moves]},
    }


def trail_of(data: dict[str, Any]) -> Trail:
    """The trail that `finalist` wrote down."""
    moves = tuple(
        Move(p, q, s, alpha, sigma, None if noise is None else tuple(noise))
        for p, q, s, alpha, sigma, noise in data["moves"]
    )
    turns = tuple((cosine, tuple(key)) for cosine, key in data["turns"])
    start = None if data["start"] is None else tuple(data["start"])
    return Trail(data["chain"], moves, turns, data["sampled"], start)
