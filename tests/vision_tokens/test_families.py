"""Every method on every family: the laws, through `generate`, on logits."""

import pytest
import torch

import mmaccel
from mmaccel import Unsupported
from mmaccel.checks import LawResult, check
from tests.vision_tokens.product import PROMPTS, assert_all_tested, assert_held, case, product
from tests.vision_tokens.tiny import FAMILIES, VIDEO_FAMILIES, Prompts, build, inputs_for
from tests.vision_tokens.tiny.weights import quecc_weights
from vision_tokens import (
    FourierVLM,
    HiRED,
    LanguageInputMethod,
    MergingMethod,
    PooledTokens,
    PruMerge,
    QueCC,
    RandomTokens,
    ToMe,
    UniformTokens,
    VisionZip,
)
from vision_tokens.laws import (
    fingerprint,
    generated,
    kept_prompt,
    language_input_laws,
    largest_difference,
    masked_logits,
)

METHODS = [
    HiRED(budget=0.2),
    HiRED(budget=0.5, split="strips", alpha=0.3),
    FourierVLM(budget=0.3),
    RandomTokens(budget=0.25),
    UniformTokens(budget=7),
    PooledTokens(budget=0.25),
    VisionZip(budget=0.4),
    PruMerge(neighbours=4),
    PruMerge(budget=0.3, spatial=True, neighbours=4, layer="feature"),
    ToMe(budget=0.4),
    QueCC(weights=quecc_weights()),
]
VIDEOS = {
    "a video": Prompts(((),), (7,), videos=((4,),)),
    "an image and a video in a padded batch": Prompts((((96, 70),), ()), (7, 9), videos=((4,), (4,))),
}
CONVOLUTIONAL = ["fast_vlm"]
OTHER_BLOCKS = ["internvl", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", *CONVOLUTIONAL]


def works(method, family):
    """Whether the encoder has what the method reads, or merges; else it is refused by name, with the reason."""
    if family == "molmo2" and isinstance(method, MergingMethod):
        return False  # an image has grids of two sizes
    if method.name == "quecc":
        return family in ("llava", "llava-siglip", "llava-mistral")
    if method.name == "tome":
        return family not in OTHER_BLOCKS
    return not (family in CONVOLUTIONAL and (method.attention or method.keys))


CASES = product(METHODS, works)
for place, method in enumerate(METHODS):
    for number, family in enumerate(VIDEO_FAMILIES):
        if works(method, family):
            kinds = ["a video"] if family == "molmo2" else list(VIDEOS)
            turn = place + number
            quick = kinds[turn % len(kinds)] if turn % 3 == 0 else None
            CASES += [case(method, family, kind, slow=kind != quick) for kind in kinds]


def test_every_method_of_the_room_is_held_to_the_laws():
    assert_all_tested(METHODS, LanguageInputMethod)


@pytest.mark.parametrize(("method", "family", "prompt"), CASES)
def test_the_laws_hold(method, family, prompt):
    model = build(family)
    inputs = inputs_for(family, {**PROMPTS, **VIDEOS}[prompt], model)
    assert_held(language_input_laws(model, method, inputs), 4)


def choice(family, budget=0.2):
    """A method that finds in the family's encoder what it reads."""
    return UniformTokens(budget=budget) if family in CONVOLUTIONAL else HiRED(budget=budget)


@pytest.mark.parametrize("family", FAMILIES)
def test_64_generated_tokens_equal_a_slow_reference(family):
    model = build(family)
    inputs = inputs_for(family, PROMPTS["a batch with a text-only row"], model)
    with mmaccel.applied(model, choice(family)):
        tokens, logits = generated(model, inputs, 64)
        reference = masked_logits(model, kept_prompt(model, inputs), tokens)
    assert largest_difference(logits, reference) < 1e-4
    assert torch.equal(logits.argmax(-1), tokens)


WORKING = [(method, family) for method in METHODS for family in FAMILIES if works(method, family)]


@pytest.mark.parametrize(("method", "family"), [case(*pair, slow=place % 4) for place, pair in enumerate(WORKING)])
def test_a_batch_equals_its_rows_one_by_one(method, family):
    model = build(family)
    prompts = Prompts((((96, 70),), ((96, 70),)), (7, 11))
    with mmaccel.applied(model, method):
        tokens, together = generated(model, inputs_for(family, prompts, model), 4)
        for row in range(2):
            single, logits = generated(model, inputs_for(family, prompts.row(row), model), 4)
            assert torch.equal(single[0], tokens[row])
            assert largest_difference(logits[0], together[row]) < 1e-5


@pytest.mark.parametrize("family", OTHER_BLOCKS)
def test_what_merges_in_the_encoder_refuses_blocks_that_it_does_not_know(family):
    with pytest.raises(Unsupported, match=r"tome .*the encoder '\w+'"):
        mmaccel.apply(build(family), ToMe())


def test_what_merges_refuses_images_with_grids_of_two_sizes():
    model = build("molmo2")
    with mmaccel.applied(model, PooledTokens()), pytest.raises(Unsupported, match=r"this molmo2 makes tokens of such"):
        model(**inputs_for("molmo2", PROMPTS["one image"], model))


@pytest.mark.parametrize("method", [METHODS[0], VisionZip()], ids=lambda method: method.name)
def test_what_reads_attention_refuses_an_encoder_without(method):
    model = build("fast_vlm")
    before = fingerprint(model)
    with pytest.raises(Unsupported, match=r"reads the encoder's attention, and the encoder of this fast_vlm has none"):
        mmaccel.apply(model, method)
    assert fingerprint(model) == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_kernel_does_not_change_the_selection(family, attention):
    model = build(family, attention)
    inputs = inputs_for(family, PROMPTS["two images"], model)
    reference = build(family, "sdpa")
    with mmaccel.applied(model, choice(family, 0.3)) as run, mmaccel.applied(reference, choice(family, 0.3)) as other:
        generated(model, inputs, 1)
        generated(reference, inputs, 1)
        for ours, theirs in zip(run.report.details["cells"], other.report.details["cells"], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_failing_half_way_leaves_the_model_as_it_was(family, monkeypatch):
    model = build(family)
    inputs = inputs_for(family, PROMPTS["one image"], model)
    _, dense = generated(model, inputs, 2)
    before = fingerprint(model)
    from mmaccel.attachment import Attachment

    calls, register = [], Attachment.hook

    def failing(self, module, hook):
        calls.append(module)
        if len(calls) == 2:
            raise RuntimeError("the second hook fails")
        register(self, module, hook)

    monkeypatch.setattr(Attachment, "hook", failing)
    with pytest.raises(RuntimeError, match="the second hook fails"):
        mmaccel.apply(model, choice(family))
    assert fingerprint(model) == before
    assert torch.equal(generated(model, inputs, 2)[1], dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_check_says_every_law_and_the_oracle_ratio_and_leaves_the_model_alone(family):
    model = build(family)
    inputs = inputs_for(family, Prompts(), model)
    generated(model, inputs, 1)  # transformers hangs hooks of its own into a model at its first call
    before = fingerprint(model)
    report = check(model, choice(family), inputs=inputs)
    assert [law.law for law in report.laws] == [
        "keeping everything is the dense model",
        "dropping equals masking",
        "the second call equals the first",
        "removed, the logits are the dense ones",
        "removed, nothing is left behind",
        "time to first token over the oracle's",
    ]
    assert all(law.passed for law in report.laws[:5]), str(report)
    assert fingerprint(model) == before


def test_check_needs_something_to_call_the_model_with():
    with pytest.raises(ValueError, match="check needs inputs, or a processor to make an example with"):
        check(build("llava"), HiRED())


def test_a_law_that_is_broken_fails(monkeypatch):
    """A cut that moves positions by one is caught, and so is one that keeps a token too many."""
    assert not LawResult("x", measured=0.2, bar=0.1).passed
    from vision_tokens.cutting import Cutter

    model = build("llava")
    inputs = inputs_for("llava", Prompts(), model)
    right = Cutter._gather_positions
    monkeypatch.setattr(Cutter, "_gather_positions", lambda self, positions, index: right(self, positions, index) + 1)
    laws = {law.law: law for law in language_input_laws(model, HiRED(budget=0.2), inputs)}
    assert not laws["dropping equals masking"].passed
    assert laws["keeping everything is the dense model"].passed
