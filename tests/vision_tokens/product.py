"""The product of methods, families and prompts: pairwise in `make test`, all of it in `make test-all`."""

import pytest

import mmaccel
from tests.vision_tokens.tiny import FAMILIES, Prompts
from vision_tokens.laws import language_input_laws

PROMPTS = {
    "one image": Prompts((((96, 70),),), (7,)),
    "two images": Prompts((((96, 70), (60, 130)),), (9,)),
    "a padded batch": Prompts((((96, 70),), ((64, 96),)), (7, 12)),
    "a batch with a text-only row": Prompts((((96, 70),), (), ((48, 96), (96, 96))), (7, 5, 8)),
}


def product(methods, works=lambda method, family: True):
    """Every method on every family with every kind of prompt.

    Of a method and a family that meet, one kind of prompt is quick, a different one each time.
    """
    return [
        case(method, family, prompt, slow=prompt != list(PROMPTS)[(i + j) % len(PROMPTS)])
        for i, method in enumerate(methods)
        for j, family in enumerate(FAMILIES)
        if works(method, family)
        for prompt in PROMPTS
    ]


def case(method, family, *more, slow):
    """One test's parameters."""
    name = "-".join((method.name, family, *more)).replace(" ", "-")
    return pytest.param(method, family, *more, id=name, marks=[pytest.mark.slow] if slow else [])


def quick_for(names, families=FAMILIES):
    """The families; those that are not among these names are slow."""
    return [pytest.param(family, marks=[] if family in names else [pytest.mark.slow]) for family in families]


def assert_held(laws, least):
    laws = list(laws)
    assert len(laws) >= least
    assert all(law.passed for law in laws), "\n".join(map(str, laws))


def holds(model, method, inputs):
    """The method keeps the laws of those that act on the language input."""
    assert_held(language_input_laws(model, method, inputs, 4), 5)


def assert_all_tested(methods, kind):
    """Every method of this base class that the room brings is among those that are held to its laws."""
    installed = map(mmaccel.get_method, mmaccel.list_methods())
    ours = {one.name for one in installed if issubclass(one, kind) and one.__module__.startswith("vision_tokens.")}
    assert {method.name for method in methods} == ours
