"""VLA-Cache: the released code's selections, and on running policies its laws."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

import mmaccel
from mmaccel import Unsupported
from robotics import VLACache, reuse
from robotics.vla_cache import looked_at, patch_similarity, reusable, reuse_shares, still
from tests.robotics.golden import load
from tests.robotics.test_pruned_policies import episode, noise_of
from tests.robotics.tiny import PATCHES, llava_inputs, observation, pi0_policy, token_policy
from tests.vision_tokens.deep import build_deep
from vision_tokens.laws import fingerprint

TENSORS, (CASE,) = load("vla_cache/vla_cache")
METHOD = VLACache(threshold=0.5, static=0.8, relevant=0.2)
MAKERS = {"llava": lambda: token_policy(), "paligemma": lambda: token_policy("paligemma"), "pi0": lambda: pi0_policy()}


@pytest.fixture(params=MAKERS)
def policy(request):
    return MAKERS[request.param]()


def golden(name):
    return TENSORS[f"c0_{name}"]


def test_what_stands_still_is_the_released_code_s():
    pictures = (golden(name).permute(2, 0, 1).float() for name in ("image", "prev_image"))
    similarity = patch_similarity(*pictures, 16)
    torch.testing.assert_close(similarity, golden("patch_similarity"), rtol=0, atol=1e-6)
    assert round(VLACache().static * 256) == CASE["static_top_k"]
    assert VLACache().threshold == CASE["similarity_threshold"]
    static = still(golden("patch_similarity"), CASE["similarity_threshold"], CASE["static_top_k"])
    assert torch.equal(golden("patch_similarity")[static], golden("patch_similarity")[golden("static_ids")])
    assert set(static.tolist()) == set(golden("static_ids").tolist())


def test_what_the_words_look_at_and_what_is_reused_are_the_released_code_s():
    attention = golden("attn_layer15_rows_of_text")[:35, 1:257].mean(dim=0)
    torch.testing.assert_close(attention, golden("text_to_vision"), rtol=1e-6, atol=1e-9)
    assert round(VLACache().relevant * 256) == CASE["task_relevant_top_k"]
    relevant = looked_at(attention, CASE["task_relevant_top_k"])
    assert set(relevant.tolist()) == set(golden("top_attention_ids").tolist())
    assert reusable(golden("static_ids"), relevant).sort().values.tolist() == golden("reusable_ids").tolist()


def test_the_layers_shares_are_the_released_code_s():
    shares = reuse_shares(golden("layer_entropy"), CASE["growth_factor"])
    torch.testing.assert_close(shares, golden("layer_reuse_fraction"), rtol=1e-6, atol=1e-7)


@given(st.lists(st.floats(0, 5), min_size=1, max_size=12))
def test_shares_lie_between_none_and_all(entropies):
    shares = reuse_shares(torch.tensor(entropies), 0.55)
    assert float(shares.min()) >= 0 and float(shares.max()) <= 1


# On running policies


def reused(report):
    return [row["tokens"] for row in report.facts["reused"]]


def test_nothing_still_is_dense(policy):
    dense, _ = episode(policy, 3)
    with mmaccel.applied(policy, VLACache(static=0.0)):
        actions, reports = episode(policy, 3)
    torch.testing.assert_close(actions, dense, rtol=1e-5, atol=1e-5)
    assert all(report["visual_tokens"] == 2 * 2 * PATCHES and reused(report) == [0, 0] for report in reports)


def test_a_picture_that_does_not_change_acts_as_if_it_were_read_anew(policy):
    """Keys and values of the step before are those that would be made again."""
    frozen = lambda rows, step: observation(rows, 0)  # noqa: E731
    dense, _ = episode(policy, 3, seen=frozen)
    with mmaccel.applied(policy, METHOD):
        actions, reports = episode(policy, 3, seen=frozen)
    torch.testing.assert_close(actions, dense, rtol=1e-5, atol=1e-5)
    assert reused(reports[0]) == [0, 0] and all(row["first_step"] for row in reports[0].facts["reused"])
    assert min(reused(reports[1])) > 5 and reports[1]["visual_tokens"] < reports[0]["visual_tokens"]


class Overwriting:
    """Everything is computed, and then, from some layer on, what rests gets keys and values of the step before."""

    def __init__(self, cache, rest_from, pairs):
        self.cache, self.rest_from, self.pairs = cache, rest_from, pairs

    def update(self, keys, values, layer_idx, *args, **kwargs):
        rests = (self.rest_from <= layer_idx)[:, None, :, None]
        if keys.shape[2] == self.rest_from.shape[1]:
            old_keys, old_values = self.pairs[layer_idx]
            keys, values = torch.where(rests, old_keys, keys), torch.where(rests, old_values, values)
        return self.cache.update(keys, values, layer_idx, *args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.cache, name)


@pytest.mark.parametrize("name", ["llava", "pi0"])
def test_resting_equals_overwriting_keys_and_values_in_a_full_forward(name, monkeypatch):
    policy = MAKERS[name]()
    model = policy.model.model.vlm if name == "pi0" else policy.model.model
    text, head = model.language_model, policy.model.action_out_proj if name == "pi0" else policy.model.lm_head
    rest_from, held, said = [], [], []
    enter = reuse.Reuser.enter

    def noting(self, *given):
        enter(self, *given)
        if (state := reuse._reading.get()) is not None:
            rest_from.append(state.rest_from)

    monkeypatch.setattr(reuse.Reuser, "enter", noting)
    seen = head.register_forward_hook(lambda module, args, out: said.append(out))
    with mmaccel.applied(policy, METHOD):
        cached = text.register_forward_hook(lambda module, args, out: held.append(
            [(layer.keys.clone(), layer.values.clone()) for layer in out.past_key_values.layers]))  # fmt: skip
        episode(policy, 2, seen=lambda rows, step: observation(rows, 6 * step))
        cached.remove()
    ours = said[-3]  # the first of three tokens, or of three denoising steps
    assert bool((rest_from[1] < len(text.layers)).any())

    def overwrite(module, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] == rest_from[1].shape[1]:
            kwargs["past_key_values"] = Overwriting(DynamicCache(config=text.config), rest_from[1], held[0])
        return args, kwargs

    def unwrap(module, args, out):
        out.past_key_values = getattr(out.past_key_values, "cache", out.past_key_values)

    hooks = [text.register_forward_pre_hook(overwrite, with_kwargs=True), text.register_forward_hook(unwrap)]
    inputs = policy.observe(observation(2, 6))
    if name == "llava":
        with torch.no_grad():
            policy.model(**inputs.model, logits_to_keep=1)
        full = said[-1]
    else:
        policy.act(inputs, noise=noise_of(policy, inputs, 1))
        full = said[-3]
    for hook in (*hooks, seen):
        hook.remove()
    torch.testing.assert_close(ours, full, rtol=1e-5, atol=1e-5)


def test_rows_equal_single_runs_and_a_second_episode_the_first(policy):
    seen = lambda rows, step: observation(rows, 3 * step)  # noqa: E731
    with mmaccel.applied(policy, METHOD):
        together, reports = episode(policy, 3, rows=4, seen=seen)
        again, _ = episode(policy, 3, rows=4, seen=seen)
        assert torch.equal(together, again) and max(reused(reports[2])) > 0
        for row in range(0, 4, 3):
            alone, _ = episode(policy, 3, rows=4, only=row, seen=seen)
            torch.testing.assert_close(alone[:, 0], together[:, row], rtol=1e-5, atol=1e-5)


def test_a_row_that_is_reset_reads_all_anew_beside_others():
    policy = token_policy()
    with mmaccel.applied(policy, METHOD):
        policy.reset()
        policy.act(policy.observe(observation()))
        policy.reset([1])
        policy.act(policy.observe(observation()))
        first, second = mmaccel.report(policy).facts["reused"]
    assert first["tokens"] > 0 and second == {"row": 1, "first_step": True, "tokens": 0}


def test_removed_the_policy_is_what_it_was(policy):
    dense, _ = episode(policy, 2)
    before = fingerprint(policy.model), set(vars(policy))
    mmaccel.apply(policy, METHOD)
    episode(policy, 2)
    mmaccel.remove(policy)
    assert (fingerprint(policy.model), set(vars(policy))) == before
    assert torch.equal(episode(policy, 2)[0], dense)


def test_what_is_refused(monkeypatch):
    with pytest.raises(
        Unsupported, match=r"compares a policy's pictures from step to step; got Llava.*ActionTokenPolicy"
    ):
        mmaccel.apply(build_deep("llava"), METHOD)
    with pytest.raises(ValueError, match=r"vla-cache's static is a share, in \[0, 1\]; got 130"):
        VLACache(static=130)
    policy = token_policy(cameras=("both",))
    policy.prepare = llava_of_two
    policy.reset()
    with mmaccel.applied(policy, METHOD), pytest.raises(Unsupported, match="square grid, and camera 0 has 72 tokens"):
        for _ in range(2):
            policy.act(policy.observe(observation(1, cameras=("both",))))
    monkeypatch.setattr("vision_tokens.inside.kernel_of", lambda method, host: "flash_attention_2")
    with pytest.raises(Unsupported, match="for every pair of tokens, which flash_attention_2 does not take"):
        mmaccel.apply(policy, METHOD)


def llava_of_two(seen):
    """One camera, whose picture is shown twice."""
    return llava_inputs(replace(seen, images={"a": seen.images["both"], "b": seen.images["both"]}))
