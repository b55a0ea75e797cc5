"""Every method that evicts from the cache, on every family: the laws, through `generate`, on logits."""

import pytest
import torch

import mmaccel
from mmaccel.checks import check
from tests.vision_tokens.deep import LAYERS, build_deep
from tests.vision_tokens.product import PROMPTS, assert_all_tested, assert_held, product, quick_for
from tests.vision_tokens.test_families import choice
from tests.vision_tokens.tiny import FAMILIES, Prompts, inputs_for
from vision_tokens import CacheMethod, FastV, HiRED, PrefixKV, ToMe
from vision_tokens.cache_laws import cache_laws, evicted_logits, watched
from vision_tokens.kept_columns import layer_columns
from vision_tokens.laws import fingerprint, generated, largest_difference

PROFILE = (0.9, 0.5, 0.25, 1.0, 0.4, 0.6)
METHODS = [PrefixKV(budget=0.4, distance=-3), PrefixKV(layers=PROFILE)]


def test_every_method_of_the_room_is_held_to_the_laws():
    assert_all_tested(METHODS, CacheMethod)


@pytest.mark.parametrize(("method", "family", "prompt"), product(METHODS))
def test_the_laws_hold(method, family, prompt):
    model = build_deep(family)
    assert_held(cache_laws(model, method, inputs_for(family, PROMPTS[prompt], model)), 5)


@pytest.mark.parametrize("family", quick_for(("llava", "gemma3")))
def test_64_generated_tokens_equal_a_slow_reference_behind_all_stages(family):
    """Tokens go before the language model, between its layers and from its caches."""
    model = build_deep(family)
    inputs = inputs_for(family, PROMPTS["a batch with a text-only row"], model)
    with mmaccel.applied(model, choice(family, 0.5), FastV(budget=0.6), METHODS[0]), watched(model) as history:
        tokens, logits = generated(model, inputs, 64)
        reference = evicted_logits(model, inputs, tokens, history)
    assert largest_difference(logits, reference) < 1e-4
    assert torch.equal(logits.argmax(-1), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_its_rows_one_by_one(family):
    """Rows of other lengths are pruned by their own lengths, to the token, and make room at their own times."""
    model = build_deep(family)
    prompts = Prompts((((96, 70),), ((96, 70),)), (7, 12))
    batch = inputs_for(family, prompts, model)
    with mmaccel.applied(model, METHODS[0]) as run:
        tokens, together = generated(model, batch, 12)
        held = run.report.facts["kv_tokens"]
        for row in range(2):
            single, logits = generated(model, inputs_for(family, prompts.row(row), model), 12)
            assert run.report.facts["kv_tokens"] == [held[row]]
            assert torch.equal(single[0], tokens[row])
            assert largest_difference(logits[0], together[row]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_does_not_change_the_selection(family):
    held = []
    for attention in ("sdpa", "eager"):
        model = build_deep(family, attention)
        with mmaccel.applied(model, METHODS[0]), torch.no_grad():
            cache = model(**inputs_for(family, PROMPTS["two images"], model), use_cache=True).past_key_values
            held.append([layer_columns(cache)[layer].index for layer in range(LAYERS)])
    assert all(torch.equal(*pair) for pair in zip(*held, strict=True))


def test_all_stages_run_once_and_their_figures_add_up():
    model = build_deep("llava")
    inputs = inputs_for("llava", PROMPTS["one image"], model)
    merging, input_method = ToMe(budget=0.5), HiRED(budget=0.5)
    alone = {}
    for method in (input_method, FastV(budget=0.5)):
        with mmaccel.applied(model, method) as run:
            generated(model, inputs, 2)
            alone[method.name] = run.report.to_dict()
    with mmaccel.applied(model, METHODS[0], FastV(budget=0.5), input_method) as run:
        generated(model, inputs, 2)
        report = run.report.to_dict()
        shares = run.report.details["evicted_shares"]
    assert [method["method"] for method in report["methods"]] == ["hired", "fastv", "prefix-kv"]
    dense = alone["hired"]["kv_bytes_dense"]
    assert report["kv_bytes_dense"] == alone["fastv"]["kv_bytes_dense"] == dense
    assert report["visual_tokens_dense"] == 36 and report["visual_tokens"] == pytest.approx(9, abs=1)
    assert report["prefill_flops_dense"] == alone["hired"]["prefill_flops_dense"]
    assert report["selection_flops"] > 0
    assert report["kv_bytes"] == sum(report["kv_tokens"][0]) * dense // (LAYERS * inputs["input_ids"].shape[1])
    assert len(shares[0]) == LAYERS and all(0 <= share < 1 for share in shares[0])
    with mmaccel.applied(model, METHODS[0], FastV(budget=0.5), merging) as run, watched(model) as history:
        tokens, logits = generated(model, inputs, 6)
        assert largest_difference(logits, evicted_logits(model, inputs, tokens, history)) < 1e-5
        assert [method["method"] for method in run.report.to_dict()["methods"]] == ["tome", "fastv", "prefix-kv"]


def test_check_says_every_law_and_leaves_the_model_alone():
    model = build_deep("llava")
    inputs = inputs_for("llava", Prompts(), model)
    generated(model, inputs, 1)  # transformers hangs hooks of its own into a model at its first call
    before = fingerprint(model)
    report = check(model, METHODS[0], inputs=inputs)
    assert [law.law for law in report.laws] == [
        "keeping everything is the dense model",
        "evicting equals masking from then on",
        "the second call equals the first",
        "removed, the logits are the dense ones",
        "removed, nothing is left behind",
    ]
    assert report.passed, str(report)
    assert fingerprint(model) == before


@pytest.mark.parametrize("broken", ["positions", "the slot", "the rows"])
def test_a_law_that_is_broken_fails(broken, monkeypatch):
    """Caught: positions that drift, room that is made in another place than said, and keys that move to other rows."""
    from vision_tokens import cache_room

    model, method = build_deep("llava"), METHODS[0]
    if broken == "positions":
        inputs = inputs_for("llava", Prompts(), model)
        with mmaccel.applied(model, PrefixKV(budget=0.4, positions="drifting")), watched(model) as history:
            tokens, logits = generated(model, inputs, 8)
            assert largest_difference(logits, evicted_logits(model, inputs, tokens, history)) > 1e-3
        return
    if broken == "the slot":
        right = cache_room.drop_column
        monkeypatch.setattr(cache_room, "drop_column", lambda layer, place: right(layer, max(place - 4, 0)))
        prompt = PROMPTS["one image"]
    else:
        right = cache_room.gather_columns
        monkeypatch.setattr(cache_room, "gather_columns", lambda layer, local: right(layer, local.flip(0)))
        prompt = PROMPTS["a padded batch"]
    laws = {law.law: law for law in cache_laws(model, method, inputs_for("llava", prompt, model))}
    assert not laws["evicting equals masking from then on"].passed
    assert laws["keeping everything is the dense model"].passed
