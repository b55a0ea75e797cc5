"""Bipartite matching, ToMe's and AIM's, reproduces the released codes' merges, and keeps its laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.vision_tokens.golden import load
from vision_tokens import Layout
from vision_tokens.aim_merging import merge_cells, merge_rounds, rounds
from vision_tokens.matching import match, merge, unmerge


@pytest.mark.parametrize("name", ["bsm_cls_197", "bsm_cls_dist_odd", "bsm_plain"])
def test_successive_matchings_are_the_released_code_s(name):
    """Plain means, their un-merging, size-weighted means, sizes, and which tokens each token left holds.

    The release un-merges as if it had not put a distillation token in front, so not there.
    """
    tensors, _ = load(f"tome/{name}")
    protected = int(tensors["class_token"]) + int(tensors["distill_token"])
    tokens, sizes = tensors["x"], None
    into = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    for step, merged in enumerate(tensors["r"].tolist()):
        matching = match(tensors[f"metric{step}"], merged, protected)
        plain, _ = merge(tokens, matching)
        torch.testing.assert_close(plain, tensors[f"merged_mean{step}"], rtol=1e-5, atol=1e-6)
        if protected < 2:
            torch.testing.assert_close(unmerge(plain, matching.into), tensors[f"unmerged{step}"], rtol=1e-5, atol=1e-6)
        tokens, sizes = merge(tokens, matching, sizes)
        torch.testing.assert_close(tokens, tensors[f"x{step}"], rtol=1e-5, atol=1e-6)
        assert torch.equal(sizes[..., None], tensors[f"size{step}"])
        into = matching.into.gather(1, into)
    holds = torch.zeros_like(tensors["source_final"]).scatter_(1, into[:, None], 1.0)
    assert torch.equal(holds, tensors["source_final"])


@pytest.mark.parametrize(("name", "steps"), [("merge_169_odd", 3), ("merge_196_r24_step", 2), ("merge_196_to_49", 2)])
def test_rounds_are_aim_s(name, steps):
    tensors, _ = load(f"aim/{name}")
    for step in range(1, steps + 1):
        merged, places = merge_rounds(tensors["x"], tensors["r"][:step].tolist())
        torch.testing.assert_close(merged, tensors[f"after_step{step}"], rtol=1e-5, atol=1e-6)
        assert places.shape == merged.shape[:2]


def test_pooling_then_merging_is_aim_s():
    tensors, _ = load("aim/pool_bilinear_27_then_merge")
    grid = tensors["x"].unflatten(1, (27, 27)).permute(0, 3, 1, 2)
    pooled = torch.nn.functional.interpolate(grid, size=(14, 14), mode="bilinear").flatten(2).mT
    merged, _ = merge_rounds(pooled, rounds(196, 49))
    torch.testing.assert_close(merged, tensors["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "kept", "expected"),
    [(196, 49, [98, 49]), (169, 22, [84, 42, 21]), (196, 74, [98, 24]), (576, 72, [288, 144, 72]), (7, 7, [])],
)
def test_the_paper_s_rounds_come_out(tokens, kept, expected):
    assert rounds(tokens, kept) == expected


@given(st.integers(1, 300), st.integers(1, 300))
def test_rounds_reach_any_number(tokens, kept):
    counts = rounds(tokens, min(kept, tokens))
    left = tokens
    for count in counts:
        assert 0 < count <= left // 2
        left -= count
    assert left == min(kept, tokens)


@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 2), st.integers(0, 2**31))
def test_a_matching_loses_nothing(tokens, merged, protected, seed):
    """The sum of all tokens stays, each with its size; protected tokens stay what and where they are."""
    protected = min(protected, tokens)
    generator = torch.Generator().manual_seed(seed)
    metric, values = torch.randn(2, tokens, 3, generator=generator), torch.randn(2, tokens, 4, generator=generator)
    matching = match(metric, merged, protected)
    out, sizes = merge(values, matching)
    assert out.shape[1] == tokens - max(0, min(merged, (tokens - protected) // 2))
    torch.testing.assert_close((out * sizes[..., None]).sum(dim=1), values.sum(dim=1), rtol=1e-4, atol=1e-4)
    assert (sizes.sum(dim=1) == tokens).all()
    torch.testing.assert_close(out[:, :protected], values[:, :protected])
    own = torch.arange(out.shape[1]).expand(2, -1)
    assert torch.equal(matching.into.gather(1, matching.seats), own)  # who is merged into sits where it says


def test_the_most_similar_pair_merges_and_no_other():
    metric = torch.tensor([[[1.0, 0], [0, 1], [1, 1], [1, 1.1]]])
    matching = match(metric, 1)
    assert matching.seats.tolist() == [[0, 1, 3]] and matching.into.tolist() == [[0, 1, 2, 2]]


def test_cells_merge_partition_by_partition_and_padding_takes_no_part():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 16, 4, generator=generator)
    source = torch.cat([torch.arange(16), 16 + torch.arange(4, 12), 32 + torch.arange(16)])
    layout = Layout(source, 3, 4, 4)
    seats, merged = merge_cells(features, layout, torch.tensor([5, 3, 5]))
    assert seats.sum(dim=1).tolist() == [5, 3, 5] and not (seats & ~layout.valid()).any()
    cells = [torch.arange(16), torch.arange(4, 12), torch.arange(16)]
    for partition, part in enumerate(merged.split([5, 3, 5])):
        alone, places = merge_rounds(
            features[partition, cells[partition]][None], rounds(len(cells[partition]), len(part))
        )
        own, order = cells[partition][places[0]].sort()
        assert torch.equal(seats[partition].nonzero().squeeze(-1), own)
        torch.testing.assert_close(part, alone[0, order])
