"""VLAPruner on running policies: the laws, over episodes, on logits and actions."""

from contextlib import ExitStack

import pytest
import torch

import mmaccel
import robotics
from mmaccel import Unsupported
from robotics import VLAPruner
from tests.robotics.tiny import LAYERS, PATCHES, build_pi0, observation, pi0_policy, token_policy
from tests.vision_tokens.deep import build_deep
from vision_tokens import HiRED
from vision_tokens.decoder_laws import layerwise_masked_logits
from vision_tokens.laws import _hide, fingerprint, generated, largest_difference

METHOD = VLAPruner(kept_share=0.25, layer=2, window=2, refresh=3)
MAKERS = {"llava": lambda: token_policy(), "paligemma": lambda: token_policy("paligemma"), "pi0": lambda: pi0_policy()}
KINDS = ["warm-up"] * 2 + ["pruned"] * 3 + ["refresh"] + ["pruned"]


@pytest.fixture(params=MAKERS)
def policy(request):
    return MAKERS[request.param]()


def noise_of(policy, inputs, seed):
    drawn = policy.draw(inputs, 1, torch.Generator().manual_seed(seed))
    return None if drawn is None else drawn[:, 0]


def episode(policy, steps=7, rows=2, only=None, seen=observation):
    """An episode's actions, [steps, rows, horizon, dims], and its reports; `only`: one row of the same episode."""
    policy.reset()
    actions, reports = [], []
    for step in range(steps):
        shown = seen(rows, step)
        noise = noise_of(policy, policy.observe(shown), step)
        if only is not None:
            shown = shown.only([only])
            noise = noise if noise is None else noise[only : only + 1]
        actions.append(policy.act(policy.observe(shown), noise=noise).actions)
        if mmaccel.attachment.attached(policy):
            reports.append(mmaccel.report(policy))
    return torch.stack(actions), reports


def test_budget_one_is_dense(policy):
    dense, _ = episode(policy)
    with mmaccel.applied(policy, VLAPruner(budget=1.0)):
        assert torch.equal(episode(policy)[0], dense)
    with mmaccel.applied(policy, VLAPruner(kept_share=1.0, layer=2)):
        torch.testing.assert_close(episode(policy)[0], dense, rtol=1e-5, atol=1e-5)


def test_steps_that_drop_nothing_are_dense_and_the_report_names_them(policy):
    dense, _ = episode(policy)
    with mmaccel.applied(policy, METHOD):
        actions, reports = episode(policy)
    for step, report in enumerate(reports):
        facts = report.facts["steps"]
        assert [row["kind"] for row in facts] == [KINDS[step]] * 2 and [row["step"] for row in facts] == [step + 1] * 2
        assert report["dense_rows"] == (0 if KINDS[step] == "pruned" else 2)
        held = 2 * PATCHES if KINDS[step] != "pruned" else round(2 * PATCHES * 0.25)
        assert all(sum(row["kept"]) == held for row in facts)
        assert report["visual_tokens"] == 2 * (2 * 2 * PATCHES + (LAYERS - 2) * held) / LAYERS
        if KINDS[step] != "pruned":
            torch.testing.assert_close(actions[step], dense[step], rtol=1e-5, atol=1e-5)
    assert reports[-1]["prefill_flops"] < reports[0]["prefill_flops"]


def test_some_pruned_step_acts_otherwise():
    policy = pi0_policy()
    dense, _ = episode(policy)
    with mmaccel.applied(policy, METHOD):
        assert not torch.allclose(episode(policy)[0][2], dense[2], atol=1e-3)


def test_removed_the_policy_is_what_it_was(policy):
    dense, _ = episode(policy)
    before = fingerprint(policy.model), set(vars(policy))
    mmaccel.apply(policy, METHOD)
    episode(policy)
    assert mmaccel.remove(policy) is policy
    assert (fingerprint(policy.model), set(vars(policy))) == before
    assert torch.equal(episode(policy)[0], dense)


def test_the_second_episode_equals_the_first(policy):
    with mmaccel.applied(policy, METHOD):
        first, _ = episode(policy)
        assert torch.equal(episode(policy)[0], first)


def test_four_rows_equal_four_single_runs(policy):
    with mmaccel.applied(policy, METHOD):
        together, _ = episode(policy, 4, rows=4)
        for row in range(4):
            alone, _ = episode(policy, 4, rows=4, only=row)
            torch.testing.assert_close(alone[:, 0], together[:, row], rtol=1e-5, atol=1e-5)


def test_a_row_that_is_reset_warms_up_again_beside_others(policy):
    """Rows of one batch stand at different steps of their episodes, and each acts as if it were alone."""
    with mmaccel.applied(policy, METHOD):
        policy.reset()
        kinds, actions = [], []
        for step in range(5):
            if step == 3:
                policy.reset([1])
            seen = observation(2, step)
            inputs = policy.observe(seen)
            actions.append(policy.act(inputs, noise=noise_of(policy, inputs, step)).actions)
            kinds.append([row["kind"] for row in mmaccel.report(policy).facts["steps"]])
        assert kinds[2:] == [["pruned"] * 2, ["pruned", "warm-up"], ["pruned", "warm-up"]]
        untouched, _ = episode(policy, 5, rows=2, only=0)
        torch.testing.assert_close(torch.stack(actions)[:, 0], untouched[:, 0], rtol=1e-5, atol=1e-5)
    dense, _ = episode(policy, 5)
    torch.testing.assert_close(actions[4][1], dense[4, 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_dropping_equals_masking_on_models_that_decode_actions(family):
    policy = token_policy(family)
    with mmaccel.applied(policy, METHOD):
        episode(policy, 2)
        inputs = policy.prepare(observation(2, 2))
        chosen, logits = generated(policy.model, inputs, 3)
        assert [row["kind"] for row in mmaccel.report(policy).facts["steps"]] == ["pruned"] * 2
    with mmaccel.applied(policy.model, METHOD):
        robotics.reset(policy.model)
        for step in range(2):
            generated(policy.model, policy.prepare(observation(2, step)), 3)
        chosen, logits = generated(policy.model, inputs, 3)
        assert largest_difference(logits, layerwise_masked_logits(policy.model, inputs, chosen)) < 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropping_equals_masking_on_pi0(attention):
    """In the vision-language model and in the expert, layer by layer, on the plain model."""
    policy = pi0_policy(attention=attention)
    padded = {"wrist": torch.tensor([False, True])}
    with mmaccel.applied(policy, METHOD) as run:
        actions, _ = episode(policy, 3, seen=lambda rows, step: observation(rows, step, padded=padded))
        inputs = policy.observe(observation(2, 2, padded=padded))
        kept = run.report.details["layer_columns"]
    tokens = inputs.model["input_ids"].shape[1]
    assert sorted(kept) == list(range(2, LAYERS))
    with ExitStack() as undo:
        for layer, columns in kept.items():
            shown = torch.zeros(2, tokens + 1, dtype=torch.bool)
            shown = shown.scatter(1, columns.index.where(columns.index >= 0, tokens), True)[:, :tokens]
            suffix = torch.ones(2, 1 + policy.horizon, dtype=torch.bool)
            for text, own in (
                (policy.model.model.vlm.language_model, shown),
                (policy.model.model.dit, torch.cat([shown, suffix], dim=1)),
            ):
                hook = lambda module, args, kwargs, own=own: _hide(own[:, None, None], module, args, kwargs)  # noqa: E731
                undo.callback(text.layers[layer].register_forward_pre_hook(hook, with_kwargs=True).remove)
        masked = policy.act(inputs, noise=noise_of(policy, inputs, 2)).actions
    torch.testing.assert_close(actions[2], masked, rtol=1e-5, atol=1e-5)


def test_a_padded_camera_takes_no_part():
    policy = pi0_policy()
    padded = {"wrist": torch.tensor([False, True])}
    with mmaccel.applied(policy, METHOD):
        _, reports = episode(policy, 3, seen=lambda rows, step: observation(rows, step, padded=padded))
    first, second = reports[2].facts["steps"]
    assert sum(first["kept"]) == round(2 * PATCHES * 0.25) and min(first["kept"]) >= PATCHES * 0.25 * 0.5 - 1
    assert second["kept"] == [round(PATCHES * 0.25), 0]


def test_the_kernel_does_not_change_the_choice():
    held = []
    for attention in ("sdpa", "eager"):
        policy = pi0_policy(attention=attention)
        with mmaccel.applied(policy, METHOD):
            held.append(episode(policy, 3)[1][2].details["layer_columns"][2].index)
    assert torch.equal(*held)


def test_check_holds_the_laws_on_a_model():
    model = build_deep("llava")
    inputs = token_policy().prepare(observation(2))
    report = mmaccel.check(model, METHOD, inputs=inputs)
    assert len(report.laws) >= 5 and report.passed, str(report)


# What is refused


def test_models_that_are_no_policy():
    with pytest.raises(Unsupported, match="visual tokens of the family 'Linear' are not supported"):
        mmaccel.apply(torch.nn.Linear(1, 1), VLAPruner())
    with pytest.raises(Unsupported, match="pi0 numbers its actions behind the whole prompt; use positions='kept'"):
        mmaccel.apply(build_pi0(), VLAPruner(positions="packed"))


def test_methods_in_front_of_it():
    with pytest.raises(ValueError, match="hired and vla-pruner both act on the stage 'prefill'"):
        mmaccel.apply(build_deep("llava"), HiRED(budget=0.5), METHOD)


def test_a_bare_model_s_batch_that_changes_its_size():
    policy = token_policy()
    with mmaccel.applied(policy.model, METHOD):
        generated(policy.model, policy.prepare(observation(2)), 1)
        with pytest.raises(ValueError, match=r"episodes of 2 rows, and this call has 3; .*robotics.reset\(model\)"):
            generated(policy.model, policy.prepare(observation(3)), 1)
        robotics.reset(policy.model)
        generated(policy.model, policy.prepare(observation(3)), 1)


def test_a_camera_that_goes_away_within_an_episode():
    policy = pi0_policy()
    policy.reset()
    with mmaccel.applied(policy, METHOD):
        for step in range(2):
            policy.act(policy.observe(observation(1, step)))
        gone = observation(1, 2, padded={"wrist": torch.tensor([True])})
        with pytest.raises(ValueError, match="row 0 began its episode with 72 visual tokens and now has 36"):
            policy.act(policy.observe(gone))
