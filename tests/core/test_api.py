"""Attaching and taking off again, on a plain module and a method of a few lines: the core knows no domain."""

import copy
import gc
import pickle
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import mmaccel
from mmaccel.attachment import attached
from mmaccel.methods import Unsupported


class Doubler:
    def __call__(self, module, args, kwargs, output):
        return 2 * output


@dataclass(frozen=True, kw_only=True)
class Doubled(mmaccel.Method):
    """Doubles what a linear layer gives."""

    name: ClassVar[str] = "doubled"
    stages: ClassVar[tuple[str, ...]] = ("decoder",)

    fail_after: int = 9

    def attach(self, target, attachment):
        if not isinstance(target, nn.Module):
            raise Unsupported("doubled takes modules")
        steps = [
            lambda: attachment.hook(target, Doubler()),
            lambda: attachment.set_attribute(target, "mark", "set"),
            lambda: attachment.swap_class(target, type("Linear", (type(target),), {"shout": lambda self: "!"})),
        ]
        for index, step in enumerate(steps):
            if index == self.fail_after:
                raise RuntimeError("attaching failed half-way")
            step()


@dataclass(frozen=True, kw_only=True)
class Frames(mmaccel.Method):
    """Acts earlier on the data's way."""

    name: ClassVar[str] = "frames"
    stages: ClassVar[tuple[str, ...]] = ("frames",)

    def attach(self, target, attachment):
        attachment.set_attribute(target, "order", [*vars(target).get("order", []), "frames"])


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def state(module):
    return type(module), {key: copy.copy(value) for key, value in vars(module).items()}


def test_apply_returns_the_same_object_and_remove_restores_it(layer):
    before, x = state(layer), torch.ones(1, 3)
    plain = layer(x)
    assert mmaccel.apply(layer, Doubled()) is layer
    assert torch.equal(layer(x), 2 * plain) and layer.mark == "set" and layer.shout() == "!"
    assert isinstance(layer, nn.Linear) and type(layer).__name__ == "Linear"
    assert mmaccel.remove(layer) is layer
    assert state(layer) == before and torch.equal(layer(x), plain)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_attaching_that_fails_half_way_unwinds_itself(layer, steps):
    before = state(layer)
    with pytest.raises(RuntimeError, match="half-way"):
        mmaccel.apply(layer, Doubled(fail_after=steps))
    assert state(layer) == before


def test_a_failing_second_apply_leaves_the_first_in_place(layer):
    mmaccel.apply(layer, Doubled())
    with pytest.raises(RuntimeError, match="half-way"):
        mmaccel.apply(layer, Doubled(fail_after=1))
    assert attached(layer).methods == (Doubled(),)
    assert layer.mark == "set"


def test_methods_attach_in_the_order_of_the_data_s_way(layer):
    mmaccel.apply(layer, Doubled(), Frames())
    assert [method.name for method in attached(layer).methods] == ["frames", "doubled"]


def test_methods_are_added_and_replaced_by_kind(layer):
    mmaccel.apply(layer, Doubled())
    mmaccel.apply(layer, Frames())
    mmaccel.apply(layer, Doubled(fail_after=7))
    assert set(attached(layer).methods) == {Frames(), Doubled(fail_after=7)}


def test_one_stage_takes_one_method(layer):
    with pytest.raises(ValueError, match="doubled and doubled both act on the stage 'decoder'"):
        mmaccel.apply(layer, Doubled(), Doubled(fail_after=7))


def test_applied_gives_back_what_was_there(layer):
    with mmaccel.applied(layer, Doubled()) as run:
        assert run.target is layer and layer.mark == "set"
    assert attached(layer) is None
    mmaccel.apply(layer, Frames())
    with pytest.raises(KeyError), mmaccel.applied(layer, Doubled()):
        raise KeyError
    assert attached(layer).methods == (Frames(),)


def test_decorate_decorates_what_a_loader_returns(layer):
    @mmaccel.decorate(Doubled())
    def load(scale: float) -> nn.Linear:
        """Loads."""
        return layer

    assert load(2.0).mark == "set" and load.__doc__ == "Loads."


@pytest.mark.parametrize("act", [mmaccel.remove, mmaccel.report])
def test_what_needs_a_decorated_target_says_so(layer, act):
    with pytest.raises(ValueError, match=r"no method is applied to this Linear; decorate it with mmaccel.apply"):
        act(layer)


def test_a_report_before_the_first_call_is_refused(layer):
    mmaccel.apply(layer, Doubled())
    with pytest.raises(ValueError, match="nothing to report yet"):
        mmaccel.report(layer)


def test_apply_takes_methods_only(layer):
    with pytest.raises(ValueError, match="apply needs at least one method"):
        mmaccel.apply(layer)
    with pytest.raises(TypeError, match=r"apply takes methods.*recipe_from_data"):
        mmaccel.apply(layer, {"method": "doubled"})
    with pytest.raises(Unsupported, match="takes modules"):
        mmaccel.apply(object(), Doubled())


@pytest.mark.parametrize("patch", ["attribute", "class", "deleted"])
def test_remove_refuses_and_names_who_patched_on_top(layer, patch):
    mmaccel.apply(layer, Doubled())
    ours = type(layer)
    if patch == "attribute":
        layer.mark, expected = state, "Linear.mark: somebody set it to tests.core.test_api.state"
    elif patch == "class":
        layer.__class__, expected = type("Theirs", (ours,), {}), "the class of Linear is now.*Theirs"
    else:
        del layer.mark
        expected = "Linear.mark: somebody deleted it"
    with pytest.raises(RuntimeError, match=expected):
        mmaccel.remove(layer)
    assert attached(layer) is not None
    layer.__class__, layer.mark = ours, "set"
    mmaccel.remove(layer)
    assert attached(layer) is None and type(layer) is nn.Linear


def test_copies_and_pickles_are_plain_and_the_original_stays_decorated(layer):
    mmaccel.apply(layer, Frames())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert attached(twin) is None and type(twin) is nn.Linear and "order" not in vars(twin)
        assert torch.equal(twin.weight, layer.weight)
    assert layer.order == ["frames"]


def test_a_module_goes_away_with_its_attachment():
    target = mmaccel.apply(nn.Linear(3, 3), Doubled(), Frames())
    gone = weakref.ref(target)
    del target
    gc.collect()
    assert gone() is None
