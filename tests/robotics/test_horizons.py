"""Mixture of horizons reproduces the released code: weights, disagreement, actions, and how many are executed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robotics.horizons import agreed, disagreement, fused, gate_weights, reaches, run_length, voted
from tests.robotics.golden import load

TENSORS, CASES = load("mixture_of_horizons/moh")
FLOW, REGRESSION = CASES[:2], CASES[2]


def outputs(name, hidden, steps):
    """What the released heads make of the expert's hidden states: actions or velocities, and gate logits."""
    hidden = hidden[None, :, -steps:]
    logits = hidden @ TENSORS[f"{name}_gate_weight"].T + TENSORS[f"{name}_gate_bias"]
    return hidden @ TENSORS[f"{name}_out_weight"].T + TENSORS[f"{name}_out_bias"], logits[..., 0].transpose(1, 2)


@pytest.mark.parametrize("case", FLOW, ids=lambda case: f"case {case['case']}")
def test_denoising_and_what_is_executed_are_the_released_code_s(case):
    name, horizons, steps = f"c{case['case']}", case["horizons"], case["denoise_steps"]
    actions = mean_actions = TENSORS[f"{name}_noise"]
    total = torch.zeros(1, horizons[-1])
    for step in range(steps):
        velocity, logits = outputs(name, TENSORS[f"{name}_suffix_hidden"][step], horizons[-1])
        weights = gate_weights(logits, horizons)
        expected = TENSORS[f"{name}_gate_weights_rounded3"][step]
        torch.testing.assert_close(weights[0], expected, rtol=0, atol=5.01e-4)
        mean = fused(velocity, weights)
        total += disagreement(velocity, mean, weights) / steps
        actions = actions - mean / steps
        mean_actions = mean_actions - fused(velocity, gate_weights(torch.zeros_like(logits), horizons)) / steps
    torch.testing.assert_close(actions[0], TENSORS[f"{name}_actions_full"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean_actions[0], TENSORS[f"{name}_actions_mean_fusion"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total[0], TENSORS[f"{name}_disagreement"], rtol=1e-5, atol=1e-6)
    for setting, expected in case["replan_by_setting"].items():
        ratio, active = setting.removeprefix("ratio").split("_minactive")
        assert agreed(total, case["min_steps"], float(ratio), horizons, int(active)).item() == expected
    count = agreed(total, case["min_steps"], case["scale_ratio"], horizons, case["min_active"]).item()
    assert count == case["replan_steps"]
    torch.testing.assert_close(actions[0, :count], TENSORS[f"{name}_actions_prefix"], rtol=1e-5, atol=1e-6)


def test_the_vote_is_the_released_code_s():
    horizons = REGRESSION["horizons"]
    actions, logits = outputs("r0", TENSORS["r0_suffix_hidden"], horizons[-1])
    weights = gate_weights(logits, horizons)
    torch.testing.assert_close(weights[0], TENSORS["r0_gate_weights"], rtol=1e-5, atol=1e-6)
    mean = fused(actions, weights)
    count = voted(actions, mean, horizons, REGRESSION["min_steps"]).clamp(max=REGRESSION["max_steps"]).item()
    assert count == REGRESSION["replan_steps"]
    torch.testing.assert_close(mean[0, :count], TENSORS["r0_actions_prefix"], rtol=1e-5, atol=1e-6)


@given(st.integers(0, 10_000), st.lists(st.integers(1, 12), min_size=1, max_size=4, unique=True))
def test_weights_are_shares_of_the_horizons_that_reach_a_step(seed, horizons):
    horizons = sorted(horizons)
    logits = torch.randn(2, horizons[-1], len(horizons), generator=torch.Generator().manual_seed(seed))
    weights, valid = gate_weights(logits, horizons), reaches(horizons, horizons[-1])
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, horizons[-1]))
    assert not bool(weights[:, ~valid].any())


def test_horizons_that_say_the_same_do_not_disagree():
    horizons, same = [2, 4], torch.randn(1, 1, 4, 3, generator=torch.Generator().manual_seed(0)).expand(2, 2, 4, 3)
    weights = gate_weights(torch.randn(2, 4, 2), horizons)
    mean = fused(same, weights)
    torch.testing.assert_close(mean, same[:, 0])
    assert disagreement(same, mean, weights).max() < 1e-5


@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0.1, 3.0))
def test_rows_are_counted_on_their_own_and_by_the_plain_rule(seed, least, ratio):
    differ = torch.rand(3, 8, generator=torch.Generator().manual_seed(seed))
    together = agreed(differ, least, ratio, [2, 5, 8], 1)
    for row, own in enumerate(differ):
        count = least
        while count < 8 and sum(h > count for h in (2, 5, 8)) > 1 and own[count] < ratio * own[:least].mean():
            count += 1
        assert together[row] == count


def test_equal_disagreement_stops():
    assert agreed(torch.ones(1, 6), 2, 1.0).tolist() == [2]
    assert run_length(torch.tensor([[True, True, True, False, True]]), 1).tolist() == [3]
