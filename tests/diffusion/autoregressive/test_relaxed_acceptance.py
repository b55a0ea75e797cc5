"""Acceptance with a word's neighbours, as LANTERN has it: fewer passes, another law; without slack, neither."""

import pytest
import torch

from diffusion.autoregressive import SpeculativeJacobi
from diffusion.autoregressive.verification import accepted, accepted_by_neighbours, excess, neighbours
from tests.diffusion.autoregressive.lossy import laws, one_draft, passes, what_comes_of


@pytest.mark.parametrize("seed", range(5))
def test_without_slack_it_is_exact(seed):
    drafts, p, q, uniforms = laws(seed)
    p[..., 7] = 0.0  # a neighbour without mass changes nothing
    near = neighbours(drafts, p, torch.randn(30, 4, generator=torch.Generator().manual_seed(seed)), 0.0)
    assert torch.equal(accepted_by_neighbours(drafts, p, q, uniforms, near), accepted(drafts, p, q, uniforms))
    assert torch.equal(excess(p, q.masked_fill(near, 0.0)), excess(p, q))


def test_neighbours_are_the_nearest_words_as_long_as_they_fit():
    embeddings = torch.tensor([[0.0], [0.1], [0.3], [0.6], [9.0]])
    p = torch.tensor([[[0.2, 0.1, 0.15, 0.3, 0.25]]])
    for slack, near in ((0.05, []), (0.2, [1]), (0.26, [1, 2]), (0.6, [1, 2, 3]), (1.0, [1, 2, 3, 4])):
        found = neighbours(torch.tensor([[0]]), p, embeddings, slack)
        assert found[0, 0].nonzero()[:, 0].tolist() == near
    q = torch.tensor([[[0.8, 0.05, 0.05, 0.05, 0.05]]])
    near = neighbours(torch.tensor([[0]]), p, embeddings, 0.26)
    for uniform, kept in ((0.45 / 0.8 - 0.01, True), (0.45 / 0.8 + 0.01, False)):
        given = torch.tensor([[0]]), p, q, torch.tensor([[uniform]]), near
        assert accepted_by_neighbours(*given).item() is kept


def test_more_slack_keeps_more_drafts_and_changes_the_law():
    """Kept with its neighbours, else drawn from what the target has more than the draft has without them."""
    drafts, p, q, uniforms = one_draft()
    embeddings, found = torch.randn(8, 3, generator=torch.Generator().manual_seed(3)), []
    for slack in (0.0, 0.1, 0.3):
        near = neighbours(drafts, p, embeddings, slack)
        kept = accepted_by_neighbours(drafts, p, q, uniforms, near)
        found.append(what_comes_of(p, q, kept, excess(p, q.masked_fill(near, 0.0))))
    shares, distances = zip(*found, strict=True)
    assert list(shares) == sorted(shares) and shares[2] > shares[0] + 0.05
    assert distances[0] < 1e-3 < 0.02 < distances[2]


def test_it_takes_fewer_passes():
    assert passes(slack=0.5) < passes(slack=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slack": 1.5}, "slack is a probability; got 1.5. 0 is lossless"),
        ({"slack": 0.1, "group": 3}, "group and slack are two ways to be lossy; take one: got 3 and 0.1"),
        (
            {"slack": 0.1, "redraw": "gumbel"},
            "plain decoding, and group=1, slack=0.1 keep what it would not draw",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SpeculativeJacobi(**settings)
