"""`tune` finds the budget that meets a target, or says plainly that there is none."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmaccel
from mmaccel import Method, OutOfReach, Unsupported, tune
from mmaccel.flops import count_flops
from mmaccel.tuning import EDGE, Trial, between
from tests.vision_tokens.tiny import Prompts, build, inputs_for
from vision_tokens import HiRED, UniformTokens


class Machine:
    """Something to call."""

    def __call__(self):
        return None


@dataclass(frozen=True, kw_only=True)
class PowerLaw(Method):
    """Costs `fixed + budget ** power` bytes a call."""

    name: ClassVar[str] = "power-law"
    stages: ClassVar[tuple[str, ...]] = ("sample",)

    budget: float = 0.5
    power: float = 1.0
    fixed: float = 0.0

    def attach(self, target, attachment):
        attachment.start_report().record("kv_bytes", 1e6 * (self.fixed + self.budget**self.power), unit="B")


@dataclass(frozen=True, kw_only=True)
class Knobless(PowerLaw):
    """Has nothing to turn."""

    name: ClassVar[str] = "knobless"
    knob: ClassVar[str | None] = None


@given(power=st.floats(1, 2), fixed=st.floats(0, 1), share=st.floats(0.05, 0.99))
def test_costs_from_linear_to_quadratic_are_met_within_5_percent_in_at_most_8_trials(power, fixed, share):
    low = 0.01**power
    wanted = 1e6 * (fixed + low + share * (1 - low))
    tuned = tune(Machine(), PowerLaw(power=power, fixed=fixed), lambda machine: machine(), kv_bytes=wanted)
    assert len(tuned.trials) <= 8
    assert abs(tuned.measured - wanted) <= 0.05 * wanted
    assert tuned.method == PowerLaw(power=power, fixed=fixed, budget=tuned.best.knob)


@given(st.floats(0.1, 0.5), st.floats(0.6, 1), st.floats(-1, 2))
def test_every_trial_shrinks_the_bracket(low, high, share):
    found = between(Trial(low, 1.0), Trial(high, 3.0), 1 + 2 * share)
    margin = 0.999 * EDGE * (high - low)
    assert low + margin <= found <= high - margin
    assert between(Trial(low, 2.0), Trial(high, 2.0), 2.0) == pytest.approx((low + high) / 2)


@pytest.fixture
def llava():
    model = build("llava")
    return model, {**inputs_for("llava", Prompts((((96, 70),),), (7,)), model), "use_cache": True}


def test_flops_and_cache_bytes_of_a_model_are_met_as_nearly_as_whole_tokens_allow(llava):
    model, inputs = llava
    with mmaccel.applied(model, HiRED(budget=0.5)) as run:
        flops = count_flops(lambda: model(**inputs))
        held = run.report["kv_bytes"]
    assert tune(model, HiRED(), inputs, flops=flops).measured == pytest.approx(flops, rel=0.025)
    tuned = tune(model, HiRED(alpha=0.3), inputs, kv_bytes=held)
    assert tuned.measured == pytest.approx(held, rel=0.025)
    assert tuned.method == HiRED(alpha=0.3, budget=tuned.best.knob)
    with pytest.raises(ValueError, match="no method is applied"):
        mmaccel.report(model)


def test_methods_that_are_applied_stay_on(llava):
    model, inputs = llava
    mmaccel.apply(model, UniformTokens(budget=0.5))
    try:
        before = mmaccel.api._require(model).methods
        tune(model, UniformTokens(), inputs, flops=1e18)
        assert mmaccel.api._require(model).methods == before
    finally:
        mmaccel.remove(model)


def test_seconds_are_wall_clock(llava):
    model, inputs = llava
    tuned = tune(model, HiRED(), lambda model: model.generate(**inputs, max_new_tokens=2), seconds=1e3)
    assert len(tuned.trials) == 1 and tuned.method.budget == 1.0 and 0 < tuned.measured < 60


def test_a_target_out_of_reach_is_said_with_what_was_measured(llava):
    model, inputs = llava
    with pytest.raises(OutOfReach, match=r"hired cannot reach 1000 FLOP: a call costs .* at budget=0.01 and") as error:
        tune(model, HiRED(), inputs, flops=1000)
    assert len(error.value.tuned.trials) == 2 and error.value.tuned.method.budget == 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one target: seconds, flops or kv_bytes; got none"),
        ({"seconds": 1, "flops": 2}, "got seconds, flops"),
        ({"kv_bytes": 0}, "kv_bytes is above 0; got 0"),
        ({"kv_bytes": float("nan")}, "kv_bytes is above 0; got nan"),
        ({"kv_bytes": 5, "trials": 1}, "at least 2 trials"),
    ],
)
def test_targets_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tune(Machine(), PowerLaw(), lambda machine: machine(), **arguments)


def test_a_method_without_a_knob_is_refused():
    with pytest.raises(Unsupported, match="knobless has no single knob to tune"):
        tune(Machine(), Knobless(), lambda machine: machine(), kv_bytes=5)


def test_a_report_without_the_figure_is_refused(llava):
    model, inputs = llava
    with pytest.raises(Unsupported, match="says nothing of kv_bytes"):
        tune(model, HiRED(), {**inputs, "use_cache": False}, kv_bytes=5)


def test_the_result_tells_its_curve(tmp_path):
    tuned = tune(Machine(), PowerLaw(), lambda machine: machine(), kv_bytes=5e5)
    assert "target 5e+05 B" in str(tuned) and str(tuned).count("<- chosen") == 1
    assert tuned.to_dict()["trials"][0] == {"knob": 1.0, "measured": 1e6}
    assert tuned.to_dict()["method"]["budget"] == tuned.best.knob
    tuned.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_flops_are_counted_as_torch_counts_them():
    a = torch.ones(3, 4)
    assert count_flops(lambda: a @ a.T) == 2 * 3 * 4 * 3
    q = torch.ones(1, 2, 5, 8)
    assert count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 5 * 5 * 16
