"""Every method that acts between decoder layers, on every family: the laws, through `generate`, on logits."""

import pytest
import torch

import mmaccel
from mmaccel import Unsupported
from mmaccel.checks import check
from tests.vision_tokens.deep import LAYERS, build_deep
from tests.vision_tokens.product import PROMPTS, assert_all_tested, assert_held, case, product
from tests.vision_tokens.test_dynamic_llava import WEIGHTS
from tests.vision_tokens.test_families import choice
from tests.vision_tokens.tiny import FAMILIES, Prompts, inputs_for
from vision_tokens import AIM, DecoderMethod, DynamicLLaVA, FastV, PyramidDrop, SparseVLM
from vision_tokens.decoder_laws import decoder_laws, layerwise_masked_logits
from vision_tokens.laws import fingerprint, generated, largest_difference
from vision_tokens.layer_columns import LayerColumns

METHODS = [
    FastV(budget=0.6),
    AIM(),
    AIM(budget=0.3, merged=1.0),
    PyramidDrop(ratio=0.6),
    SparseVLM(budget=0.5, recycle=False),
    SparseVLM(budget=0.5),
    DynamicLLaVA(weights=WEIGHTS, budget=0.6),
]


def works(method, family):
    """Qwen3-VL's first two layers (here) add visual features, and no token may leave before them; an image of Molmo 2
    has grids of two sizes, and is not merged."""
    if family == "molmo2" and getattr(method, "merged", 1.0) != 1.0:
        return False
    return family != "qwen3_vl" or min(method.cuts(LAYERS), default=LAYERS) >= 2


# Laws that cost more: each family with one method in `make test`, with all of them in test-all.
IN_TURN = []
for place, family in enumerate(FAMILIES):
    able = [method for method in METHODS if works(method, family)]
    for number, method in enumerate(able):
        IN_TURN.append(case(method, family, slow=number != place % len(able)))


def test_every_method_of_the_room_is_held_to_the_laws():
    assert_all_tested(METHODS, DecoderMethod)


@pytest.mark.parametrize(("method", "family", "prompt"), product(METHODS, works))
def test_the_laws_hold(method, family, prompt):
    model = build_deep(family)
    assert_held(decoder_laws(model, method, inputs_for(family, PROMPTS[prompt], model), 6), 4)


def test_layers_that_add_visual_features_are_not_cut_before():
    model = build_deep("qwen3_vl")
    with (
        mmaccel.applied(model, FastV(layer=1)),
        pytest.raises(Unsupported, match=r"layers 0..1, so tokens can be dropped"),
    ):
        model(**inputs_for("qwen3_vl", Prompts(), model))


LONG = [(family, False) for family in FAMILIES] + [("llava", True)]
LONG += [  # molmo2 makes tokens of a batch's images across their tiles, which nothing can merge
    pytest.param(family, True, marks=pytest.mark.slow) for family in FAMILIES if family not in ("llava", "molmo2")
]


@pytest.mark.parametrize(("family", "aim"), LONG)
def test_long_answers_equal_a_slow_reference(family, aim):
    """Tokens go before the language model and between its layers; rows keep different numbers of them."""
    model = build_deep(family)
    inputs = inputs_for(family, PROMPTS["a batch with a text-only row"], model)
    methods, length = ([AIM(budget=0.3)], 128) if aim else ([choice(family, 0.5), METHODS[0]], 64)
    with mmaccel.applied(model, *methods):
        tokens, logits = generated(model, inputs, length)
        reference = layerwise_masked_logits(model, inputs, tokens)
    assert largest_difference(logits, reference) < 1e-4
    assert torch.equal(logits.argmax(-1), tokens)


@pytest.mark.parametrize(("method", "family"), IN_TURN)
def test_a_batch_equals_its_rows_one_by_one(method, family):
    model = build_deep(family)
    prompts = Prompts((((96, 70),), ((96, 70),)), (7, 11))
    batch = inputs_for(family, prompts, model)
    with mmaccel.applied(model, method):
        tokens, together = generated(model, batch, 4)
        for row in range(2):
            single, logits = generated(model, inputs_for(family, prompts.row(row), model), 4)
            assert torch.equal(single[0], tokens[row])
            assert largest_difference(logits[0], together[row]) < 1e-5


@pytest.mark.parametrize(("method", "family"), IN_TURN)
def test_the_kernel_does_not_change_the_selection(method, family):
    held = []
    for attention in ("sdpa", "eager"):
        model = build_deep(family, attention)
        with mmaccel.applied(model, method) as run:
            generated(model, inputs_for(family, PROMPTS["two images"], model), 1)
            held.append(run.report.details["layer_columns"])
    assert held[0].keys() == held[1].keys() != set()
    assert all(torch.equal(held[0][layer].index, held[1][layer].index) for layer in held[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_check_says_every_law_and_leaves_the_model_alone(family):
    model = build_deep(family)
    inputs = inputs_for(family, Prompts(), model)
    generated(model, inputs, 1)  # transformers hangs hooks of its own into a model at its first call
    before = fingerprint(model)
    report = check(model, FastV(budget=0.6), inputs=inputs)
    assert [law.law for law in report.laws] == [
        "keeping everything is the dense model",
        "dropping in a layer equals masking from it on",
        "the second call equals the first",
        "removed, the logits are the dense ones",
        "removed, nothing is left behind",
        "time to first token over the oracle's",
    ]
    assert all(law.passed for law in report.laws[:5]), str(report)
    assert fingerprint(model) == before


@pytest.mark.parametrize("broken", ["rotary tables", "later masks"])
def test_a_law_that_is_broken_fails(broken, monkeypatch):
    """Layers that get the first tokens' rotary tables are caught, and so are later steps that forget the padding."""
    model, prompt = build_deep("llava"), PROMPTS["a batch with a text-only row"]
    if broken == "rotary tables":
        monkeypatch.setattr(
            "vision_tokens.layer_columns.taken", lambda value, index, dim: first(value, index.shape[1], dim)
        )
    else:
        right = LayerColumns.adjusted
        monkeypatch.setattr(
            LayerColumns, "adjusted",
            lambda self, run, number, kwargs: kwargs if run.new == 1 and kwargs["attention_mask"] is None
            else right(self, run, number, kwargs),
        )  # fmt: skip
        prompt = Prompts((((96, 70),), ((96, 70), (48, 48))), (7 + 38, 7))  # equal lengths: no mask comes in
    laws = {law.law: law for law in decoder_laws(model, FastV(budget=0.6), inputs_for("llava", prompt, model))}
    assert not laws["dropping in a layer equals masking from it on"].passed
    assert laws["keeping everything is the dense model"].passed


def first(value, width, dimension):
    if isinstance(value, tuple):
        return tuple(first(part, width, dimension) for part in value)
    return value.narrow(dimension, 0, width)
