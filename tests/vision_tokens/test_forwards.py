"""What can be asked of a forward behind a cut: precisions, hidden states, gradients."""

import pytest
import torch

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.product import case, holds
from tests.vision_tokens.test_families import works
from tests.vision_tokens.tiny import FAMILIES, Prompts, build, inputs_for
from tests.vision_tokens.usage import own
from vision_tokens import FourierVLM, HiRED, PooledTokens, RandomTokens
from vision_tokens.families import find_host
from vision_tokens.laws import generated, largest_difference

METHOD = HiRED(budget=0.25)
ATTENTIVE = [family for family in FAMILIES if works(METHOD, family)]
ONE, TWO = Prompts(), Prompts((((96, 70),), ((64, 96),)), (7, 12))


def working(*methods):
    """These methods with the families that they work on."""
    return [case(method, family, slow=False) for method in methods for family in ATTENTIVE if works(method, family)]


@pytest.mark.parametrize(("method", "family"), working(METHOD, FourierVLM(budget=0.25)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_the_laws(family, dtype, method):
    model = own(family).to(dtype)
    inputs = inputs_for(family, TWO, model)
    holds(model, method, {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})


@pytest.mark.parametrize("family", ATTENTIVE)
def test_generation_without_a_cache_gives_the_same(family):
    model = build(family)
    inputs = inputs_for(family, TWO, model)
    with mmaccel.applied(model, METHOD):
        _, cached = generated(model, inputs, 5)
        _, anew = generated(model, {**inputs, "use_cache": False}, 5)
    assert largest_difference(cached, anew) < 1e-5


def test_hidden_states_and_attentions_are_those_of_the_kept_tokens():
    model = build("llava", "eager")
    inputs = inputs_for("llava", ONE, model)
    held = inputs["input_ids"].shape[1] - 27
    with mmaccel.applied(model, METHOD), torch.no_grad():
        bare = model(**inputs).logits
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
        run = model.generate(
            **inputs, max_new_tokens=2, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
    assert torch.equal(out.logits, bare)
    assert [state.shape for state in out.hidden_states] == [(1, held, 32)] * 3
    assert [rows.shape for rows in out.attentions] == [(1, 4, held, held)] * 2
    assert [step[0].shape[-1] for step in run.attentions] == [held, held + 1]


def test_features_come_as_a_tuple_to_whom_asks_for_one():
    model = build("llava")
    pixels = inputs_for("llava", ONE, model)["pixel_values"]
    dense = model.model.get_image_features(pixels, return_dict=False)
    with mmaccel.applied(model, METHOD):
        given = model.model.get_image_features(pixels, return_dict=False)
    assert len(given) == len(dense) and torch.equal(given[0], dense[0])


def test_an_encoder_that_changed_since_apply_is_refused():
    model, inputs = own(), inputs_for("llava", ONE, build("llava"))
    with mmaccel.applied(model, METHOD):
        with pytest.raises(Unsupported, match=r"with vision_feature_layer -2; this call asks for -1. Set model.config"):
            model(**inputs, vision_feature_layer=-1)
        cut = model(**inputs).logits
        model.set_attn_implementation("eager")
        with pytest.raises(Unsupported, match=r"was 'sdpa' when hired was applied, and is 'eager' now; call mmaccel"):
            model(**inputs)
        mmaccel.apply(model, METHOD)
        assert largest_difference(model(**inputs).logits, cut) < 1e-5


def test_features_in_the_old_spelling_are_refused():
    model = build("smolvlm")
    inputs = inputs_for("smolvlm", ONE, model)
    with mmaccel.applied(model, METHOD), pytest.raises(Unsupported, match="computed without the method"):
        model.model(input_ids=inputs["input_ids"], mm_encoder_outputs=torch.zeros(9, 32))


@pytest.mark.parametrize(
    ("method", "family"), working(METHOD, RandomTokens(), FourierVLM(gain="paper"), PooledTokens())
)
def test_gradients_flow_as_through_the_kept_tokens(family, method):
    """The gradient of a decorated forward equals the finite difference along it."""
    model = own(family).double().train()
    inputs = inputs_for(family, ONE, model)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    weight = find_host(model).text.get_input_embeddings().weight
    ends = ("fc2.weight", "down_proj.weight")
    encoder = next(p for name, p in find_host(model).tower.named_parameters() if name.endswith(ends))

    def loss():
        return model(**inputs).logits[:, -1].logsumexp(-1).sum()

    with mmaccel.applied(model, method):
        with torch.inference_mode():
            model(**inputs)
        loss().backward()
        for part in (weight, encoder):
            step = 1e-3 * part.grad / part.grad.norm()  # the norms run in float32 whatever the model does
            with torch.no_grad():
                part += step
                above = loss()
                part -= 2 * step
                below = loss()
                part += step
            torch.testing.assert_close((above - below) / 2e-3, part.grad.norm(), rtol=1e-2, atol=1e-4)
