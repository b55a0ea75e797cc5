"""What lossy ways to accept drafts do to one draft, and to a picture's passes."""

import torch

import mmaccel
from diffusion.autoregressive import SpeculativeJacobi
from tests.diffusion.autoregressive.test_jacobi import decoded, llama

WORDS, TRIES = 8, 2000


def laws(seed, rows=6, drafts=5, words=30):
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(rows, drafts, words, generator=generator).softmax(-1) for _ in range(2))
    tokens = torch.multinomial(q.flatten(0, 1), 1, generator=generator).reshape(rows, drafts)
    return tokens, p, q, torch.rand(rows, drafts, generator=generator)


def one_draft(seed=3):
    """Two laws of one draft, p and q, for every word at every uniform number: drafts, p, q, uniforms."""
    _, p, q, _ = laws(seed, 1, 1, WORDS)
    uniforms = ((torch.arange(TRIES) + 0.5) / TRIES)[:, None].expand(-1, WORDS)
    return torch.arange(WORDS).expand(TRIES, -1), *(law.expand(TRIES, WORDS, -1) for law in (p, q)), uniforms


def what_comes_of(p, q, kept, replaced):
    """By exact probabilities, the share that is kept, and how far from p it all is, in total variation."""
    p, q, chance = p[0, 0].double(), q[0, 0].double(), kept.double().mean(dim=0)
    out = q * chance + ((q * (1 - chance))[:, None] * replaced[0].double()).sum(dim=0)
    return float((q * chance).sum()), float((out - p).abs().sum() / 2)


def passes(**settings):
    """Of six pictures of 30 tokens."""
    model, total = llama(), 0
    with mmaccel.applied(model, SpeculativeJacobi(window=8, **settings)) as run:
        for seed in range(6):
            decoded(model, seed=seed, tokens=30)
            total += run.report["passes"]
    return total
