"""Entropic annealing reproduces the released code's numbers, and tempers only early and only lopsided weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.annealing import clipped_effective_sample_size, normalised_entropy, temperature
from diffusion.resampling import normalised, systematic
from tests.vision_tokens.golden import load

log_weights = st.lists(st.floats(-20, 20), min_size=1, max_size=16).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


@pytest.mark.parametrize("count", [4, 8, 16])
def test_statistics_temperatures_probabilities_and_ancestors_are_the_released_code_s(count):
    golden, _ = load("particle_filtering/entropic_annealing")
    trace = {key.split(".")[1]: value for key, value in golden.items() if key.startswith(f"n{count}.")}
    for row, log_weight in enumerate(trace["log_weights"]):
        progress = int(trace["step"][row]) / int(golden["max_steps"])
        assert torch.allclose(normalised(log_weight), trace["probabilities"][row], rtol=1e-12, atol=0)
        assert clipped_effective_sample_size(log_weight) == pytest.approx(float(trace["ess"][row]), rel=1e-12)
        assert normalised_entropy(log_weight) == pytest.approx(float(trace["normalised_entropy"][row]), rel=1e-12)
        for rule, tolerance in {"ess": 1e-12, "entropy": 1e-12, "base": 1e-7}.items():  # base is stored in float32
            expected = float(trace[f"temperature_{rule}"][row])
            assert temperature(log_weight, progress, rule) == pytest.approx(expected, rel=tolerance)
        tempered = log_weight / temperature(log_weight, progress, "ess")
        assert torch.allclose(normalised(tempered), trace["annealed_probabilities"][row], rtol=1e-12, atol=0)
        ancestors = systematic(tempered, trace["uniform"][row].expand(count))
        assert torch.equal(ancestors, trace["systematic_indices"][row])


@given(log_weights, st.floats(0, 1), st.sampled_from(["ess", "entropy", "base"]))
def test_the_temperature_is_never_below_one_and_is_one_when_late_or_even(log_weight, progress, rule):
    given_temperature = temperature(log_weight, progress, rule)
    assert given_temperature >= 1
    if progress >= 0.5:
        assert given_temperature == 1
    assert temperature(torch.zeros(8, dtype=torch.float64), progress, rule) == 1


@pytest.mark.parametrize("rule", ["ess", "entropy", "base"])
def test_tempering_fades_as_sampling_goes_on(rule):
    log_weight = torch.tensor([6.0, 0.0, -1.0, 0.5], dtype=torch.float64)
    temperatures = [temperature(log_weight, step / 12, rule) for step in range(1, 7)]
    assert temperatures == sorted(temperatures, reverse=True)
    assert temperatures[0] > 1
