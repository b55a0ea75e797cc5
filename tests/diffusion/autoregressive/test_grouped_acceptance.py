"""Acceptance by groups of words, as GSD has it: fewer passes and another distribution; with groups of one, neither."""

import pytest
import torch

import mmaccel
from diffusion.autoregressive import SpeculativeJacobi
from diffusion.autoregressive.verification import accepted, accepted_by_group, excess
from tests.diffusion.autoregressive.test_jacobi import decoded, llama


def laws(seed, rows=6, drafts=5, words=30):
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(rows, drafts, words, generator=generator).softmax(-1) for _ in range(2))
    tokens = torch.multinomial(q.flatten(0, 1), 1, generator=generator).reshape(rows, drafts)
    return tokens, p, q, torch.rand(rows, drafts, generator=generator)


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_one_word_are_exact(seed):
    given = laws(seed)
    assert torch.equal(accepted_by_group(*given, group=1), accepted(*given))


def test_a_group_is_the_words_of_about_the_drafts_probability():
    p = torch.tensor([[[0.40, 0.05, 0.28, 0.25, 0.02]]])
    q = torch.tensor([[[0.10, 0.10, 0.10, 0.60, 0.10]]])
    draft = torch.tensor([[3]])  # next to it are 0.28 and, too far away, 0.05
    ratio = (0.25 + 0.28) / (0.60 + 0.10)
    for uniform, kept in ((ratio - 0.01, True), (ratio + 0.01, False)):
        assert accepted_by_group(draft, p, q, torch.tensor([[uniform]]), group=3).item() is kept
    assert not accepted(draft, p, q, torch.tensor([[ratio - 0.01]])).item()


def test_larger_groups_keep_more_drafts_and_change_the_law():
    """What comes out of one draft, by its exact probabilities: kept by group, else drawn from the excess."""
    generator = torch.Generator().manual_seed(3)
    p, q = (torch.randn(1, 1, 8, generator=generator).softmax(-1) for _ in range(2))
    words, shares, distances = torch.arange(8), [], []
    for group in (1, 3, 7):
        grid = (torch.arange(2000) + 0.5) / 2000
        tokens, uniforms = words.repeat_interleave(2000)[:, None], grid.repeat(8)[:, None]
        laws_of = (law.expand(16000, 1, 8) for law in (p, q))
        kept = accepted_by_group(tokens, *laws_of, uniforms, group).reshape(8, 2000).double().mean(dim=1)
        mass = q[0, 0] * kept
        out = mass + (1 - mass.sum()) * excess(p, q)[0, 0]
        shares.append(float(mass.sum()))
        distances.append(float((out - p[0, 0]).abs().sum() / 2))
    assert shares == sorted(shares) and shares[2] > shares[0] + 0.05
    assert distances[0] < 1e-3 < 0.02 < distances[2]


def test_it_takes_fewer_passes():
    model, passes = llama(), {}
    for group in (1, 7):
        with mmaccel.applied(model, SpeculativeJacobi(window=8, group=group)) as run:
            passes[group] = 0
            for seed in range(6):
                decoded(model, seed=seed, tokens=30)
                passes[group] += run.report["passes"]
    assert passes[7] < passes[1]
