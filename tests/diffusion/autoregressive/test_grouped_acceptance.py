"""Acceptance by groups of words, as GSD has it: fewer passes and another distribution; with groups of one, neither."""

import pytest
import torch

from diffusion.autoregressive.verification import accepted, accepted_by_group, excess
from tests.diffusion.autoregressive.lossy import laws, one_draft, passes, what_comes_of


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
    """Kept by group, else drawn from the excess."""
    drafts, p, q, uniforms = one_draft()
    found = [what_comes_of(p, q, accepted_by_group(drafts, p, q, uniforms, group), excess(p, q)) for group in (1, 3, 7)]
    shares, distances = zip(*found, strict=True)
    assert list(shares) == sorted(shares) and shares[2] > shares[0] + 0.05
    assert distances[0] < 1e-3 < 0.02 < distances[2]


def test_it_takes_fewer_passes():
    assert passes(group=7) < passes(group=1)
