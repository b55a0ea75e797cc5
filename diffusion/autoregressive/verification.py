"""Drafted tokens of a discrete vocabulary against the target's laws: acceptance, excess, coupling, fresh drafts.

A draft x that was drawn from q is kept with probability min(1, p(x)/q(x)) and replaced by a draw from the law
proportional to max(0, p - q) otherwise; what comes out has the law p.  The theorem of arXiv:2410.01699 needs that q is
the law that x was drawn from, given the past; a law with all its mass on x always is.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SPREAD = 0.15  # of the probabilities in a group, GSD's delta
NEIGHBOURS = 1000  # of a word, at most, LANTERN's k


def accepted(
    drafts: Int[Tensor, "rows drafts"],
    p: Float[Tensor, "rows drafts words"],
    q: Float[Tensor, "rows drafts words"],
    uniforms: Float[Tensor, "rows drafts"],
) -> Bool[Tensor, "rows drafts"]:
    """Whether each draft, tested for itself, is kept: u < p(x)/q(x).  p[:, i] is the target's law of draft i."""
    mine, theirs = (law.gather(-1, drafts[..., None])[..., 0] for law in (p, q))
    return uniforms * theirs < mine


def accepted_by_group(
    drafts: Int[Tensor, "rows drafts"],
    p: Float[Tensor, "rows drafts words"],
    q: Float[Tensor, "rows drafts words"],
    uniforms: Float[Tensor, "rows drafts"],
    group: int,
) -> Bool[Tensor, "rows drafts"]:
    """Whether each draft is kept for its group: u < p(C)/q(C).  Not lossless, unless a group is one word.

    C: the draft and the words next to it in the order of p, `group // 2` on each side, those whose p differs by at most
    `SPREAD`.  Source: GSD, arXiv:2508.07747, without its limit on the distance of embeddings.
    """
    rank = p.argsort(dim=-1, descending=True).argsort(dim=-1)
    mine, place = (values.gather(-1, drafts[..., None]) for values in (p, rank))
    members = ((rank - place).abs() <= group // 2) & ((p - mine).abs() <= SPREAD)
    above, below = ((law * members).sum(dim=-1) for law in (p, q))
    return uniforms * below < above


def neighbours(
    drafts: Int[Tensor, "rows drafts"],
    p: Float[Tensor, "rows drafts words"],
    embeddings: Float[Tensor, "words width"],
    slack: float,
) -> Bool[Tensor, "rows drafts words"]:
    """The words next to each draft, nearest first, as long as their probabilities sum to at most `slack`."""
    count = min(NEIGHBOURS, p.shape[-1] - 1)
    apart = torch.cdist(embeddings[drafts], embeddings.expand(len(drafts), -1, -1))
    nearest = apart.scatter(-1, drafts[..., None], torch.inf).topk(count, dim=-1, largest=False).indices
    near = p.gather(-1, nearest).cumsum(dim=-1) <= slack
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, nearest, near)


def accepted_by_neighbours(
    drafts: Int[Tensor, "rows drafts"],
    p: Float[Tensor, "rows drafts words"],
    q: Float[Tensor, "rows drafts words"],
    uniforms: Float[Tensor, "rows drafts"],
    near: Bool[Tensor, "rows drafts words"],
) -> Bool[Tensor, "rows drafts"]:
    """Whether each draft is kept with its neighbours' probability beside its own: u < (p(x) + p(near)) / q(x).

    Not lossless, unless the neighbours have no mass.  What replaces a rejected draft is to be drawn from the excess of
    p over q without those neighbours.  Source: LANTERN, arXiv:2410.03355, algorithm 1.
    """
    mine, theirs = (law.gather(-1, drafts[..., None])[..., 0] for law in (p, q))
    return uniforms * theirs < mine + (p * near).sum(dim=-1)


def prefix(kept: Bool[Tensor, "rows drafts"]) -> Int[Tensor, "rows"]:
    """How many drafts stand before the first that does not."""
    return kept.int().cumprod(dim=1).sum(dim=1)


def excess(p: Float[Tensor, "*batch words"], q: Float[Tensor, "*batch words"]) -> Float[Tensor, "*batch words"]:
    """The law proportional to max(0, p - q); p itself where rounding leaves no excess, as p and q are equal there."""
    left = (p - q).clamp_min(0)
    total = left.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, left / total.clamp_min(torch.finfo(p.dtype).tiny), p)


def drawn(
    law: Float[Tensor, "rows drafts words"], generator: torch.Generator | None = None
) -> Int[Tensor, "rows drafts"]:
    """One word of each law."""
    rows, drafts, words = law.shape
    if not drafts:
        return law.new_zeros(rows, 0, dtype=torch.long)
    return torch.multinomial(law.reshape(-1, words), 1, generator=generator).reshape(rows, drafts)


def drawn_by(
    law: Float[Tensor, "rows drafts words"], gumbels: Float[Tensor, "rows drafts words"]
) -> Int[Tensor, "rows drafts"]:
    """One word of each law, as a fixed function of its Gumbel noise: argmax(log p + g)."""
    return (law.log() + gumbels).argmax(dim=-1)


def fresh(
    initial: str,
    guesses: Int[Tensor, "rows fresh"],
    last: Int[Tensor, "rows"],
    first_column: int,
    row_length: int | None,
) -> Int[Tensor, "rows fresh"]:
    """The first drafts of positions that were never predicted.

    guesses: uniform over the words, kept as they are by "uniform".  "repeat-left" repeats `last`, the word before them
    ("sample-left": the likeliest there, which the caller hands in), except where a line of the picture starts.
    first_column: of the first fresh position.  Source: arXiv:2410.01699, section 4.3, as its release has it.
    """
    if initial == "uniform":
        return guesses
    columns = first_column + torch.arange(guesses.shape[1], device=guesses.device)
    starts = torch.zeros_like(columns, dtype=torch.bool) if row_length is None else columns % row_length == 0
    return torch.where(starts, guesses, last[:, None])


def one_hot(tokens: Int[Tensor, "rows drafts"], words: int) -> Float[Tensor, "rows drafts words"]:
    """The laws with all mass on these words."""
    return torch.nn.functional.one_hot(tokens, words).float()
