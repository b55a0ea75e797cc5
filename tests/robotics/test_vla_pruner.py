"""VLA-Pruner reproduces the released code's selections, scores and guides, and what it mends."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmaccel import Unsupported
from robotics import ActionBins, VLAPruner
from robotics.gaze import Gaze
from robotics.vla_pruner import dual_top, most_different
from tests.robotics.golden import load
from vision_tokens.decoder_layers import keep_highest
from vision_tokens.layer_view import LayerView

TENSORS, CASES = load("vla_pruner/selection")
HISTORY, RUN = load("vla_pruner/history_w3")
MODES = {"last_token": "last", "prefill": "prefill", "text_to_vision": "text"}
RELEASED = VLAPruner.preset("openvla-released")


class MatrixView(LayerView):
    """A layer whose attention, averaged over the heads, is given."""

    @classmethod
    def of(cls, matrix, visual):
        view = cls(matrix[None, None], matrix[None, None], 1.0, None, visual, torch.ones_like(visual))
        object.__setattr__(view, "matrix", matrix[None, None])
        return view

    def rows(self, places):
        return self.matrix[:, :, places[0].clamp(min=0)] * (places >= 0)[:, None, :, None]

    def blocks(self, temperature=1.0):
        yield from ((row, self.matrix[:, :, row : row + 1, : row + 1]) for row in reversed(range(self.matrix.shape[2])))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: f"case {case['case']}")
def test_the_kept_tokens_are_the_released_code_s(case, mode):
    name, patches, count = f"c{case['case']}", case["num_visual"], case["num_keep"]
    attention = TENSORS[f"{name}_attn_layer2_headmean"]
    visual = torch.zeros(1, len(attention), dtype=torch.bool)
    visual[:, 1 : patches + 1] = True
    method = VLAPruner(rows=MODES[mode], kept_share=1 - case["prune_ratio"])
    assert method.kept(32, patches) == (count,)
    semantic = method.score(MatrixView.of(attention, visual))
    kept = keep_highest(semantic, visual, [count]) | ~visual
    assert torch.equal(kept[0].nonzero().flatten(), TENSORS[f"{name}_{mode}_kept"])
    if mode == "text_to_vision":
        return
    guide, features = torch.zeros(visual.shape), torch.zeros(*visual.shape, TENSORS[f"{name}_visual_embeds"].shape[1])
    guide[visual], features[visual] = TENSORS[f"{name}_action_guide"], TENSORS[f"{name}_visual_embeds"]
    kept = method.select(semantic, guide, features, visual.long() - 1, [count]) | ~visual
    assert torch.equal(kept[0].nonzero().flatten(), TENSORS[f"{name}_dual_{mode}_kept"])


@pytest.mark.parametrize("number", [0, 1])
def test_the_order_of_the_most_different_is_the_released_code_s(number):
    features, order = TENSORS[f"mmdp{number}_features"], TENSORS[f"mmdp{number}_order"]
    among = torch.ones(1, len(features), dtype=torch.bool)
    assert torch.equal(most_different(features[None], among, len(order))[0], order)


def attended(step, action):
    """Attention of an action token over the prompt's places, dropped ones zero."""
    row, kept = HISTORY[f"t{step}_a{action}_layer15"].mean(dim=0), HISTORY[f"t{step}_kept"]
    return torch.zeros(RUN["prompt_len"]).index_copy(0, kept, row[: len(kept)])


def history_of(method, steps):
    """The newest first, as an episode's memory keeps it."""
    gaze, places = Gaze(), torch.arange(RUN["image_start"], RUN["image_start"] + RUN["num_visual"])
    for step in range(steps):
        gaze.begin(method, places)
        gaze.kept = torch.isin(places, HISTORY[f"t{step}_kept"])
        for action in range(RUN["action_tokens"]):
            gaze.see(attended(step, action))
    gaze.begin(method, places)
    return gaze


@pytest.mark.parametrize("step", range(6))
def test_scores_and_guides_are_the_released_code_s_and_the_paper_s(step):
    assert (RELEASED.window, RELEASED.decay) == (RUN["window"], RUN["gamma"])
    gaze = history_of(RELEASED, step + 1)
    torch.testing.assert_close(gaze.history[0], HISTORY[f"t{step}_score"], rtol=1e-6, atol=1e-9)
    if step < 2:
        assert gaze.kind == "warm-up"
        return
    assert gaze.kind == "pruned"
    guide = RELEASED.guide(gaze.history)
    torch.testing.assert_close(guide, HISTORY[f"t{step}_next_guide_f32_as_released"], rtol=1e-5, atol=1e-9)
    paper = replace(RELEASED, heaviest="newest").guide(gaze.history)
    torch.testing.assert_close(paper, HISTORY[f"t{step}_next_guide_f32_paper"], rtol=1e-5, atol=1e-9)
    assert not torch.allclose(paper, guide, rtol=1e-2)
    if step < 5:
        given = HISTORY[f"t{step + 1}_guide_bf16"].float()
        torch.testing.assert_close(guide.bfloat16().float(), given, rtol=0.01, atol=0)


def test_action_tokens_become_the_released_code_s_actions():
    bins = ActionBins(vocabulary=32000)
    for step in range(6):
        actions = bins.centres(HISTORY[f"t{step}_action_token_ids"])
        torch.testing.assert_close(actions, HISTORY[f"t{step}_action"], rtol=0, atol=1e-12)


# Laws of the choice

SCORES = st.integers(0, 10_000)


@given(SCORES, st.integers(1, 30), st.integers(1, 3), st.floats(0, 1), st.data())
def test_as_many_stay_as_are_asked_for_and_every_camera_has_its_floor(seed, patches, cameras, floor, data):
    generator = torch.Generator().manual_seed(seed)
    camera = torch.cat([torch.full((patches,), number) for number in range(cameras)]).repeat(2, 1)
    count = data.draw(st.integers(1, patches * cameras))
    semantic, guide = torch.rand(2, 2, patches * cameras, generator=generator)
    semantic[:, :patches] += 1  # one camera would win
    features = torch.randn(2, patches * cameras, 4, generator=generator)
    counts = [count, patches * cameras]
    kept = VLAPruner(floor=floor).select(semantic, guide, features, camera, counts)
    assert kept.sum(dim=-1).tolist() == counts
    for number in range(cameras):
        assert int((kept[0] & (camera[0] == number)).sum()) >= min(patches, int(floor * count / cameras))


@given(SCORES)
def test_what_stays_is_among_the_best_by_either_score(seed):
    generator = torch.Generator().manual_seed(seed)
    semantic, guide = torch.rand(2, 1, 24, generator=generator)
    everything = torch.ones(1, 24, dtype=torch.bool)
    kept = dual_top(semantic, guide, torch.randn(1, 24, 4, generator=generator), everything, [8])
    best = keep_highest(semantic, everything, [8]) | keep_highest(guide, everything, [8])
    assert not bool((kept & ~best).any())


def test_doubles_of_a_kept_token_go_first():
    features = torch.eye(6)[[0, 1, 2, 0, 1, 2]][None]
    order = most_different(features, torch.ones(1, 6, dtype=torch.bool), 6)[0]
    assert sorted(order[:3].remainder(3).tolist()) == [0, 1, 2] and sorted(order.tolist()) == list(range(6))


def test_a_row_chooses_alike_alone_and_in_a_batch():
    generator = torch.Generator().manual_seed(3)
    semantic, guide = torch.rand(2, 3, 20, generator=generator)
    features, camera = torch.randn(3, 20, 8, generator=generator), torch.zeros(3, 20).long()
    camera[1, :4] = -1
    together = VLAPruner().select(semantic, guide, features, camera, [5, 7, 20])
    for row, count in enumerate([5, 7, 20]):
        own = slice(row, row + 1)
        alone = VLAPruner().select(semantic[own], guide[own], features[own], camera[own], [count])
        assert torch.equal(alone[0], together[row])


def test_a_dropped_token_comes_back_where_the_release_only_confirms_itself():
    """One token matters to actions throughout, and the prompt never sees it: the mended memory keeps it."""
    attention = torch.tensor([0.1, 0.1, 0.5, 0.1])
    kept = torch.tensor([True, True, False, True])
    for unseen, lasting in (("zero", 0.0), ("carried", 0.5)):
        method, gaze = VLAPruner(unseen=unseen, window=2, refresh=None), Gaze()
        for step in range(6):
            gaze.begin(method, torch.arange(4))
            seen = torch.ones(4, dtype=torch.bool) if step < 2 else kept
            gaze.kept = seen
            gaze.see(attention.where(seen, 0.0) / (1 if bool(seen.all()) else 0.5))
        gaze.begin(method, torch.arange(4))
        assert float(gaze.history[0][2]) == pytest.approx(lasting)
        if unseen == "carried":  # a softmax over fewer tokens gives each more; what is remembered is not inflated
            torch.testing.assert_close(gaze.history[0], attention)


def test_steps_warm_up_prune_and_refresh_in_turn():
    method, gaze, kinds = VLAPruner(window=2, refresh=3), Gaze(), []
    for _ in range(10):
        gaze.begin(method, torch.arange(4))
        gaze.see(torch.ones(4))
        kinds.append(gaze.kind)
    assert kinds == ["warm-up"] * 2 + ["pruned"] * 3 + ["refresh"] + ["pruned"] * 3 + ["refresh"]


def test_an_episode_shorter_than_the_window_drops_nothing():
    gaze = Gaze()
    for _ in range(5):
        gaze.begin(VLAPruner(window=9), torch.arange(4))
        gaze.see(torch.ones(4))
        assert gaze.kind == "warm-up"


# Settings


def test_settings_out_of_range():
    with pytest.raises(ValueError, match=r"vla-pruner's floor lies in \[0, 1\]; got 2"):
        VLAPruner(floor=2)
    with pytest.raises(ValueError, match=r"vla-pruner's kept_share.*lies in \[0, 1\]; got 1.5"):
        VLAPruner(kept_share=1.5)
    with pytest.raises(ValueError, match="vla-pruner's window is a number of steps from 1 up; got 0"):
        VLAPruner(window=0)
    with pytest.raises(ValueError, match=r"give vla-pruner a budget, the mean over layers, or kept_share.*got both"):
        VLAPruner(budget=0.5, kept_share=0.5)
    with pytest.raises(Unsupported, match=r"this decoder has 3: they lie, ascending, in 1..2"):
        VLAPruner().cuts(3)
    with pytest.raises(Unsupported, match=r"action_layer lies in 3..5, got 9; None reads the second half"):
        VLAPruner(action_layer=9).action_layers(6)
    assert list(VLAPruner().action_layers(32)) == list(range(16, 32))
    assert VLAPruner.from_dict(RELEASED.to_dict()) == RELEASED
