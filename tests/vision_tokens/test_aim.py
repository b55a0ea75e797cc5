"""AIM reproduces the released code's ranks and schedule, and spends its budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.golden import language_model, load, read_then_decode
from vision_tokens import AIM
from vision_tokens.aim import importance, ramp_shares, walk
from vision_tokens.kept_columns import layer_columns
from vision_tokens.layer_columns import current_run
from vision_tokens.layer_cutting import per_layer
from vision_tokens.layer_view import LayerView
from vision_tokens.prefill_cost import prefill_flops, selection_flops


def blocks_of(matrix, size, causal=True):
    return lambda: [
        (start, matrix[:, :, start : start + size, : start + size if causal else None])
        for start in reversed(range(0, matrix.shape[2], size))
    ]


@pytest.mark.parametrize("size", [7, 16, 48])
def test_ranks_are_the_released_code_s_whatever_the_blocks(size):
    tensors, _ = load("aim/pagerank_T48")
    matrix = (tensors["masked_logits"] / 0.1).softmax(dim=-1)
    real = torch.ones(2, 48, dtype=torch.bool)
    torch.testing.assert_close(
        importance(blocks_of(matrix, size), real, 5), tensors["importance"], rtol=1e-5, atol=1e-7
    )


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.integers(0, 2**31))
def test_walking_in_blocks_is_multiplying_by_the_power_of_the_matrix(tokens, size, steps, causal, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 2, tokens, tokens, generator=generator)
    shown = torch.ones(tokens, tokens, dtype=torch.bool).tril() if causal else torch.ones(tokens, tokens).bool()
    matrix = logits.masked_fill(~shown, -torch.inf).softmax(dim=-1)
    mass = torch.rand(1, 1, tokens, generator=generator)
    expected = (mass[:, :, None] @ torch.linalg.matrix_power(matrix, steps))[:, :, 0]
    found = mass
    for many in [steps] if causal else [1] * steps:
        found = walk(blocks_of(matrix, size, causal)(), found, many)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


class Told(AIM):
    """AIM that is told the released code's ranks, layer by layer, of the tokens still there."""

    def score(self, view):
        index = current_run().index
        raw = next(TOLD)
        return raw[None] if index is None else raw[index]


TOLD = iter(())


@pytest.mark.parametrize("told", [True, False], ids=["told-the-ranks", "ranking-itself"])
def test_the_schedule_the_cuts_and_the_logits_are_the_released_code_s(told):
    """Ranks of its own differ once tokens are gone: in the released code these vote on."""
    global TOLD
    tensors, _ = load("aim/in_llm_pruning_tiny_qwen2")
    TOLD = iter(tensors["importance_raw"][14:22])
    hidden, heads, key_heads, intermediate, layers, vocabulary = tensors["config"].tolist()
    start, end, total = tensors["boundaries"][0].tolist()
    model = language_model(
        "qwen2", tensors, vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
    )  # fmt: skip
    visual = torch.zeros(1, total, dtype=torch.bool)
    visual[:, start:end] = True
    with mmaccel.applied(model, (Told if told else AIM)(merged=1.0)):
        logits, cache = read_then_decode(model, tensors["inputs_embeds"], visual, tensors["decode_tokens"])
    held = layer_columns(cache)
    assert sorted(held) == list(range(15, 28))
    for layer, columns in held.items():
        keep = tensors["keep_after_layer"][layer - 1].nonzero().flatten()
        assert len(columns.index[0]) == len(keep)
        if told or layer in (15, 16):
            assert torch.equal(columns.index[0], keep)
    if told:
        expected = torch.cat([tensors["logits_prefill_last"], tensors["decode_logits"]])
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-6)


def test_the_ramp_is_the_paper_s():
    video, image = AIM.preset("llava-onevision-7b-video"), AIM.preset("llava-1.5-7b")
    assert list(video.cuts(28)) == list(range(15, 23))
    assert video.kept(28, 1568) == [1372, 1176, 980, 784, 588, 392, 196, 0]
    assert AIM().kept(28, 1568) == video.kept(28, 1568)  # the default, on any depth
    assert list(image.cuts(32)) == list(range(14, 22))
    assert (video.merged_share, image.merged_share) == (0.25, 0.125)


def test_the_paper_s_budget_is_the_paper_s_setting():
    method = AIM(budget=0.25 * 18.5 / 28)
    assert method.merged_share == pytest.approx(0.25)
    assert method.shares(28) == pytest.approx(AIM().shares(28))


@given(st.integers(2, 60), st.floats(0.01, 0.999))
def test_merging_and_the_ramp_together_meet_the_budget(layers, budget):
    method = AIM(budget=budget)
    if budget / method.merged_share < 1 / layers:
        with pytest.raises(Unsupported, match=r"first layer works on all visual tokens.*raise it, or merge more"):
            method.cuts(layers)
        return
    shares = method.shares(layers)
    assert shares[0] == 1 and shares == sorted(shares, reverse=True)
    assert method.merged_share * sum(shares) / layers == pytest.approx(budget, rel=1e-6)


@given(st.integers(3, 60), st.floats(0.05, 0.9), st.floats(0.01, 0.1))
def test_a_larger_budget_lets_no_layer_work_on_fewer_tokens(layers, budget, more):
    if budget / AIM(budget=budget).merged_share >= 1 / layers:
        low, high = (AIM(budget=share) for share in (budget, min(budget + more, 1.0)))
        pairs = zip(low.shares(layers), high.shares(layers), strict=True)
        assert low.merged_share <= high.merged_share
        assert all(low.merged_share * a <= high.merged_share * b + 1e-6 for a, b in pairs)


def test_ramp_shares_fall_in_a_straight_line():
    assert ramp_shares(6, 1, 4) == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("tokens", [40, 700])
def test_a_view_s_blocks_are_the_rows_of_the_matrix(tokens):
    """With an earlier turn in front, grouped queries, padding and a temperature; no n-by-n matrix is made."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, tokens, 8, generator=generator)
    key = torch.randn(2, 2, tokens + 3, 8, generator=generator)
    real = torch.ones(2, tokens, dtype=torch.bool)
    real[0, :5] = False
    mask = (
        torch.ones(tokens, tokens + 3, dtype=torch.bool).tril(3)[None, None]
        & torch.cat([torch.ones(2, 3, dtype=torch.bool), real], dim=-1)[:, None, None]
    )
    logits = query @ key.repeat_interleave(2, dim=1).mT * 0.3 / 0.1
    full = logits.masked_fill(~mask, -torch.inf).softmax(dim=-1)[..., 3:].where(real[:, None, :, None], 0)
    for shown in (mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)):
        view = LayerView(query, key, 0.3, shown, torch.zeros_like(real), real)
        for start, block in view.blocks(0.1):
            assert block.shape[2] <= 256
            expected = full[:, :, start : start + block.shape[2], : block.shape[3]]
            torch.testing.assert_close(block, expected, rtol=1e-5, atol=1e-6)


def test_the_first_token_may_go_without_leaving_nan():
    """A prompt that begins with visual tokens: the released code's first row sees nothing once its token is gone."""
    real = torch.ones(1, 3, dtype=torch.bool)
    query = torch.randn(1, 1, 3, 4)
    view = LayerView(query, query, 0.5, None, real, real)
    assert AIM().score(view).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"budget": 64}, TypeError, r"aim's budget is a fraction in \(0, 1\]; got 64"),
        ({"budget": 0.5, "merged": 0.4}, ValueError, r"lies in \(0, 1\] and above the budget.*got 0.4 and the budget"),
        ({"ramp": (5, 5)}, ValueError, r"the first with none; got \(5, 5\)"),
        ({"temperature": 0.0}, ValueError, r"temperature is above 0 and iterations are 1 or more; got 0.0 and 5"),
        ({"budget": 0.5, "ramp": (3, 5)}, ValueError, r"give aim a budget, the mean over layers, or ramp.*got both"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, error, text):
    with pytest.raises(error, match=text):
        AIM(**settings)


def test_a_ramp_behind_the_decoder_is_refused():
    with pytest.raises(Unsupported, match=r"aim's ramp \(9, 12\) begins behind the last of this decoder's 6 layers"):
        AIM(ramp=(9, 12)).cuts(6)


def test_32_frames_cost_less_by_the_paper_s_factor():
    """LLaVA-OneVision-7B on 32 frames: counted on the shapes of its language model, ranking included."""
    from transformers import Qwen2Config, Qwen2Model

    config = Qwen2Config(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                         intermediate_size=18944, vocab_size=8)  # fmt: skip
    with torch.device("meta"):
        text = Qwen2Model(config)
    visual, words, method = 32 * 196, 100, AIM.preset("llava-onevision-7b-video")
    merged = visual // 4
    kept = dict(zip(method.cuts(28), method.kept(28, merged), strict=True))
    widths = [words + count for count in per_layer(merged, kept, 28)]
    dense, ours = prefill_flops(text, 1, visual + words), prefill_flops(text, 1, widths[0], widths)
    assert dense == pytest.approx(99.63e12, rel=0.06)  # the paper's figure
    assert dense / ours > 6.4
    views = {}
    for cut in kept:
        query, key = torch.empty(1, 28, widths[cut - 1], 128), torch.empty(1, 4, widths[cut - 1], 128)
        real = torch.ones(1, widths[cut - 1], dtype=torch.bool)
        views[cut] = LayerView(query, key, 1.0, None, real, real).without_values()
    assert dense / (ours + selection_flops(text, method, views)) > 6.3
