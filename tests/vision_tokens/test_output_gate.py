"""The output gate lets in what it says, on every family: laws on logits, exact lengths of caches, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.deep import LAYERS, build_deep
from tests.vision_tokens.golden import FOLDER, llama, load, places, read_then_decode
from tests.vision_tokens.product import PROMPTS, assert_held, product, quick_for
from tests.vision_tokens.test_dynamic_llava import GOLDEN, WEIGHTS
from tests.vision_tokens.test_families import choice
from tests.vision_tokens.tiny import FAMILIES, Prompts, inputs_for
from vision_tokens import DynamicLLaVA, OutputGate, PrefixKV
from vision_tokens.cache_laws import cache_laws, evicted_logits, watched
from vision_tokens.gating import Answer
from vision_tokens.kept_columns import layer_columns, rows_of
from vision_tokens.laws import generated, largest_difference
from vision_tokens.predictors import OutputPredictor

METHODS = [OutputGate(budget=0.4), OutputGate(weights=WEIGHTS, layer=3)]
WINDOWS = "llava-mistral"  # in all of its layers
GATED = [family for family in FAMILIES if family != WINDOWS]
PAIR = Prompts((((96, 70),), ((96, 70),)), (7, 12))


def answered(model, inputs, length):
    """The answer, its logits and the cache behind it."""
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=length, min_new_tokens=length, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    return out.sequences[:, -length:], torch.stack(out.logits, dim=1), out.past_key_values


@pytest.mark.parametrize(("method", "family", "prompt"), product(METHODS, lambda _, family: family in GATED))
def test_the_laws_hold(method, family, prompt):
    model = build_deep(family)
    assert_held(cache_laws(model, method, inputs_for(family, PROMPTS[prompt], model)), 5)


@pytest.mark.parametrize("family", quick_for(("llava", "gemma3"), GATED))
def test_64_tokens_equal_a_slow_reference_behind_all_stages(family):
    """Tokens go before the language model, between its layers, and while the answer is written."""
    model = build_deep(family)
    inputs = inputs_for(family, PROMPTS["a batch with a text-only row"], model)
    methods = choice(family, 0.5), DynamicLLaVA(weights=WEIGHTS, budget=0.6, layer=3), METHODS[0]
    with mmaccel.applied(model, *methods), watched(model) as history:
        tokens, logits = generated(model, inputs, 64)
        reference = evicted_logits(model, inputs, tokens, history)
    assert largest_difference(logits, reference) < 1e-4
    assert torch.equal(logits.argmax(-1), tokens)


@pytest.mark.parametrize("family", GATED)
def test_a_batch_equals_its_rows_one_by_one(family):
    """Rows decide apart, and none attends to the padding that makes up for what another one holds."""
    model = build_deep(family)
    with mmaccel.applied(model, METHODS[0]):
        tokens, together, cache = answered(model, inputs_for(family, PAIR, model), 12)
        said = rows_of(cache)
        for row in range(2):
            single, logits, alone = answered(model, inputs_for(family, PAIR.row(row), model), 12)
            assert torch.equal(rows_of(alone).admitted[0], said.admitted[row])
            assert torch.equal(single[0], tokens[row])
            assert largest_difference(logits[0], together[row]) < 1e-5
    assert not torch.equal(said.admitted[0], said.admitted[1])


@pytest.mark.parametrize("method", METHODS, ids=["novelty", "predictor"])
def test_the_cache_holds_what_was_let_in_to_the_token(method):
    model = build_deep("llava")
    inputs = inputs_for("llava", Prompts((((96, 70),),), (7,)), model)
    prompt = inputs["input_ids"].shape[1]
    with mmaccel.applied(model, method) as run:
        _, _, cache = answered(model, inputs, 20)
        report = run.report.to_dict()
    admitted = rows_of(cache).admitted
    assert admitted.shape == (1, 19) and 0 < (count := int(admitted.sum())) < 19
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert lengths == [prompt + 19] * method.layer + [prompt + count] * (LAYERS - method.layer)
    assert cache.get_seq_length() == prompt + 19
    assert (report["cached_answer"], report["cached_answer_dense"]) == (count, 19)
    assert report["kv_bytes"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert report["kv_bytes_dense"] == report["kv_bytes"] // sum(lengths) * (prompt + 19) * LAYERS


def test_the_predictor_decides_by_the_states_before_its_layer_as_the_released_code_does():
    tensors, _ = load(GOLDEN)
    predictor = OutputPredictor.load(WEIGHTS, 32)
    with torch.no_grad():
        keep, drop = predictor(tensors["output_states"]).unbind(-1)
    admitted = METHODS[1].admits((keep - drop).flatten(), torch.zeros(18, 0)).view(2, 9)
    assert torch.equal(admitted, tensors["output_keep"].bool())
    model = build_deep("llava")
    inputs = inputs_for("llava", Prompts((((96, 70),),), (7,)), model)
    with mmaccel.applied(model, METHODS[1]), torch.no_grad():
        first = model(**inputs, use_cache=True)
        word = first.logits[:, -1:].argmax(-1)
        out = model(input_ids=word, past_key_values=first.past_key_values, output_hidden_states=True)
        keep, drop = predictor(out.hidden_states[3][:, 0]).unbind(-1)
    assert torch.equal(rows_of(out.past_key_values).admitted[:, 0], keep > drop)


def test_prompt_and_answer_are_the_released_code_s_to_the_logit():
    """Both predictors in one model: what enters the layer, which words are cached, and every logit."""
    tensors, exact = load("dynamic_llava/decoding")
    start, length, layer = tensors["start_len_layer"].tolist()
    model, visual = llama(tensors), places(tensors, start, length)
    weights = str(FOLDER / "dynamic_llava/decoding.safetensors")
    cut = DynamicLLaVA(weights=weights, layer=layer, kept_share=float(exact["vision_keep_rate"]))
    with mmaccel.applied(model, cut, OutputGate(weights=weights, layer=layer)):
        logits, cache = read_then_decode(model, tensors["inputs_embeds"], visual, tensors["decode_tokens"])
    assert torch.equal(rows_of(cache).admitted[0], tensors["admitted"].bool())
    lengths = [held.keys.shape[2] for held in cache.layers]
    assert lengths == tensors["cache_lengths"].tolist()
    said = visual.shape[1] + tensors["admitted"].nonzero().flatten()
    held = layer_columns(cache)[layer].extended(lengths[layer])[0]
    assert torch.equal(held, torch.cat([tensors["keep_indices"], said]))
    torch.testing.assert_close(logits, tensors["logits"], rtol=1e-5, atol=1e-5)


@given(st.lists(st.floats(0, 2, width=32), min_size=1, max_size=40), st.floats(0.01, 1.0))
def test_a_token_is_let_in_that_is_newer_than_enough_of_those_before(worth, share):
    method, worths = OutputGate(budget=share), torch.tensor([worth])
    for at, own in enumerate(worth):
        newer = sum(before >= own for before in worth[:at])
        assert bool(method.admits(worths[:, at], worths[:, :at])) == (newer < share * (at + 1))


def test_repetitions_are_let_in_at_share_one_alone():
    same = torch.ones(1, 9)
    assert [bool(OutputGate(budget=0.5).admits(same[:, at], same[:, :at])) for at in range(9)] == [
        True,
        *[False] * 8,
    ]
    assert all(bool(OutputGate(budget=1.0).admits(same[:, at], same[:, :at])) for at in range(9))


def test_what_is_remembered_goes_with_the_rows():
    answer = Answer.unsaid(2, 4, torch.device("cpu"))
    answer = answer.said(torch.eye(2, 4), torch.tensor([0.5, 1.0]), torch.tensor([True, False]))
    turned = answer.mapped(lambda rows: rows[[1, 0]])
    assert turned.admitted.tolist() == [[False], [True]] and turned.worth.tolist() == [[1.0], [0.5]]
    assert turned.known.tolist() == [[0.0] * 4, [1.0, 0.0, 0.0, 0.0]]


def test_beams_score_what_their_own_caches_give_them():
    model = build_deep("llava")
    inputs = inputs_for("llava", Prompts((((96, 70),),), (7,)), model)
    with mmaccel.applied(model, METHODS[0]):
        out = model.generate(
            **inputs, num_beams=3, num_return_sequences=3, length_penalty=0.0, max_new_tokens=6, min_new_tokens=6,
            do_sample=False, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        for beam, score in enumerate(out.sequences_scores):
            tokens = out.sequences[beam : beam + 1, -6:]
            with torch.no_grad():
                step = model(**inputs, use_cache=True)
                total = step.logits[:, -1].log_softmax(-1)[0, tokens[0, 0]]
                for place in range(5):
                    step = model(input_ids=tokens[:, place : place + 1], past_key_values=step.past_key_values)
                    total = total + step.logits[:, -1].log_softmax(-1)[0, tokens[0, place + 1]]
            torch.testing.assert_close(total, score, rtol=1e-5, atol=1e-4)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"output-gate weights, whose predictor decides by itself, or a budget.*both"):
        OutputGate(weights="w", budget=0.5)
    with pytest.raises(
        ValueError, match=r"of an answer's tokens that is cached lies in \(0, 1\]; got 0.0. For all say 1.0"
    ):
        OutputGate(budget=0.0)
    with pytest.raises(ValueError, match="layer is a number from 0 up; got -1"):
        OutputGate(layer=-1)
    with pytest.raises(
        Unsupported, match=r"judges what layer 6 reads, and this decoder has the layers 0\.\.5; set lay"
    ):
        mmaccel.apply(build_deep("llava"), OutputGate(layer=6))
    with pytest.raises(Unsupported, match=r"all layers of this model from 2 on have a window.*would do nothing here"):
        mmaccel.apply(build_deep(WINDOWS), OutputGate())
    with pytest.raises(ValueError, match="prefix-kv and output-gate both act on the stage 'kv_cache'"):
        mmaccel.apply(build_deep("llava"), PrefixKV(), OutputGate())
    with pytest.raises(Unsupported, match="numbers the tokens that a layer holds, and output-gate takes some of them"):
        mmaccel.apply(build_deep("llava"), DynamicLLaVA(positions="packed"), OutputGate())


@pytest.mark.parametrize("method", METHODS, ids=["novelty", "predictor"])
def test_hidden_states_that_hold_nan_are_refused(method):
    model = build_deep("llava")
    inputs = inputs_for("llava", Prompts((((96, 70),),), (7,)), model)
    inputs["pixel_values"] = inputs["pixel_values"] * torch.nan
    with (
        mmaccel.applied(model, method),
        pytest.raises(ValueError, match="hidden states hold NaN, so output-gate cannot judge tokens"),
    ):
        generated(model, inputs, 3)


def test_calls_that_it_cannot_follow_are_refused():
    model = build_deep("llava")
    inputs = inputs_for("llava", Prompts((((96, 70),),), (7,)), model)
    with mmaccel.applied(model, METHODS[0]), torch.no_grad():
        with pytest.raises(
            Unsupported, match="output-gate shrinks the key-value cache, and this call keeps none; leave"
        ):
            model(**inputs, use_cache=False)
        with pytest.raises(
            Unsupported, match=r"evicts from a dynamic cache that stays on the device.*leave cache_impl"
        ):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(ValueError, match="cannot be cropped, so neither can a guess be taken back"):
            model.generate(**inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
