"""What people do with a vision-language model: it works behind a cut, or refuses by name."""

import copy

import pytest
import torch

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.tiny import Prompts, build, inputs_for, picture
from tests.vision_tokens.usage import answered, assert_beams_score_as_masked, continued, prompt_of
from vision_tokens import HiRED, RandomTokens, UniformTokens
from vision_tokens.kept_columns import held_length
from vision_tokens.laws import fingerprint, generated, kept_prompt, largest_difference, masked_logits

METHOD = HiRED(budget=0.25)
VARIED = ["gemma3", "internvl", "llava", "llava-mistral", "llava_next", "llava_onevision", "mistral3", "paligemma",
          "paligemma-2", "qwen2_5_vl", "qwen3_vl", "smolvlm"]  # fmt: skip
"""A family of every way to pack tokens, make masks and count positions."""


@pytest.mark.parametrize("family", VARIED)
def test_a_second_turn_on_a_kept_cache_equals_masking(family):
    model, question = build(family), torch.tensor([[11, 12, 13, 14]])
    inputs = prompt_of(family)
    with mmaccel.applied(model, METHOD):
        prompt = kept_prompt(model, inputs)
        answer, _, cache = answered(model, inputs)
        second = continued(family, inputs, answer, question)
        tokens, logits, _ = answered(model, second, past_key_values=cache)
        reference = masked_logits(model, prompt, torch.cat([answer, question, tokens], dim=1))[:, -5:]
    assert largest_difference(logits, reference) < 1e-5


@pytest.mark.parametrize(("family", "tokens"), [("llava", 36), ("gemma3", 9), ("llava-mistral", 36)])
def test_a_second_turn_with_a_new_image_cuts_it_too(family, tokens):
    model, inputs, later = build(family), prompt_of(family), picture(5, 5, (1, 3, 48, 48))
    question = torch.tensor([[11, 5, *[99] * tokens, 6, 12]])
    with mmaccel.applied(model, METHOD) as run:
        answer, _, cache = answered(model, inputs, 4)
        before = held_length(cache)
        second = continued(family, inputs, answer, question, later)
        answer, logits, cache = answered(model, second, 4, past_key_values=cache)
        assert run.report["visual_tokens"] == tokens // 4
        assert held_length(cache) == before + 1 + 4 + tokens // 4 + 3  # a token not cached yet, text, the image, answer
        both = {**second, "pixel_values": torch.cat([inputs["pixel_values"], later])}
        reference = masked_logits(model, kept_prompt(model, both), answer)
    assert largest_difference(logits, reference) < 1e-5


@pytest.mark.parametrize("family", ["llava", "gemma3", "llava-mistral"])
def test_an_image_in_a_second_turn_only_is_cut(family):
    """The cache of the first turn was never cut, so nothing was remembered of it."""
    model, places = build(family), 9 if family == "gemma3" else 36
    inputs = inputs_for(family, Prompts(((),), (30,)), model)
    question = torch.tensor([[11, 5, *[99] * places, 6, 12]])
    with mmaccel.applied(model, METHOD):
        answer, _, cache = answered(model, inputs, 4)
        second = continued(family, inputs, answer, question, picture(5, 5, (1, 3, 48, 48)))
        answer, logits, _ = answered(model, second, 12, past_key_values=cache)
        reference = masked_logits(model, kept_prompt(model, second), answer)
    assert largest_difference(logits, reference) < 1e-5


def test_the_cache_counts_what_was_seen_and_holds_what_was_kept(llava):
    inputs = prompt_of()
    length = inputs["input_ids"].shape[1]
    with mmaccel.applied(llava, METHOD), torch.no_grad():
        cache = llava(**inputs, use_cache=True).past_key_values
    assert cache.get_seq_length() == length
    assert held_length(cache) == cache.layers[0].keys.shape[2] == length - 27
    twin = copy.deepcopy(cache)
    assert twin.get_seq_length() == length
    assert twin.get_seq_length.__self__ is twin


def test_only_the_tail_of_a_cut_cache_can_be_cropped(llava):
    inputs = prompt_of()
    with mmaccel.applied(llava, METHOD):
        _, _, cache = answered(llava, inputs, 4)
        seen = cache.get_seq_length()
        cache.crop(-2)
        assert cache.get_seq_length() == seen - 2
        with pytest.raises(ValueError, match=r"only the 7 tokens behind the last dropped one can be cropped.*got -50"):
            cache.crop(-50)


@pytest.mark.parametrize("family", VARIED)
def test_every_beam_scores_what_masking_gives_it(family):
    """Two rows with different numbers of images, four beams: each beam kept its own row's columns."""
    model = build(family)
    prompts = Prompts((((96, 70),), ((64, 96), (48, 48))), (7, 12))
    with mmaccel.applied(model, METHOD):
        assert_beams_score_as_masked(model, family, prompts)


def test_samples_of_one_prompt_share_its_image(llava):
    inputs = prompt_of()
    with mmaccel.applied(llava, METHOD):
        torch.manual_seed(0)
        out = llava.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert out.shape == (3, inputs["input_ids"].shape[1] + 4)


def test_a_forward_with_pixels_equals_masking(llava):
    """Without `generate`: no positions, no cache; the logits are those of the kept tokens."""
    inputs = prompt_of()
    with mmaccel.applied(llava, METHOD), torch.no_grad():
        ours = llava(**inputs, use_cache=False).logits
        prompt = kept_prompt(llava, inputs)
        reference = masked_logits(llava, prompt, torch.tensor([[3]]))
    assert ours.shape[1] == int(prompt.keep.sum())
    assert largest_difference(ours[:, -1:], reference) < 1e-5


def test_embeddings_in_place_of_ids_give_the_same(llava):
    inputs = prompt_of()
    with mmaccel.applied(llava, METHOD), torch.no_grad():
        ours = llava(**inputs).logits
        embeddings = llava.get_input_embeddings()(inputs["input_ids"])
        given = llava(
            inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], pixel_values=inputs["pixel_values"]
        ).logits
    assert largest_difference(ours, given) < 1e-6


def test_packed_positions_equal_the_bare_model_on_the_short_prompt(llava):
    inputs = prompt_of()
    with mmaccel.applied(llava, HiRED(budget=0.25, positions="packed")):
        tokens, logits = generated(llava, inputs, 6)
        prompt = kept_prompt(llava, inputs)
    short = prompt.embeddings[:, prompt.keep[0]]
    with torch.no_grad():
        after = llava.get_input_embeddings()(tokens[:, :-1])
        hidden = llava.model.language_model(inputs_embeds=torch.cat([short, after], dim=1)).last_hidden_state
        reference = llava.lm_head(hidden[:, -6:])
    assert largest_difference(logits, reference) < 1e-5


def test_scores_and_a_streamer_come_as_usual(llava):
    class Collector:
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen.append(value)

        def end(self):
            self.ended = True

    inputs, collector = prompt_of(), Collector()
    with mmaccel.applied(llava, METHOD):
        out = llava.generate(
            **inputs, max_new_tokens=5, do_sample=False, streamer=collector, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert len(out.scores) == 5 and out.scores[0].shape == (1, 100)
    assert collector.ended and len(collector.seen) == 6
    assert torch.equal(torch.cat([part.flatten() for part in collector.seen[1:]]), out.sequences[0, -5:])


def test_more_tokens_than_exist_are_refused_at_the_call(llava):
    with mmaccel.applied(llava, UniformTokens(budget=50)):
        with pytest.raises(ValueError, match=r"asks for 50 visual tokens, but there are only 36; pass at most 36"):
            llava(**prompt_of())
        assert torch.isfinite(llava(input_ids=torch.tensor([[1, 4]])).logits).all()


def test_a_finished_mask_is_cut_along(llava):
    inputs = prompt_of()
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with mmaccel.applied(llava, METHOD), torch.no_grad():
        expected = llava(**inputs).logits
        assert largest_difference(llava(**{**inputs, "attention_mask": mask}).logits, expected) < 1e-6
        with pytest.raises(Unsupported, match=r"\[batch, heads, tokens, tokens\]; got 3 dimensions"):
            llava(**{**inputs, "attention_mask": mask[0]})


def test_a_model_of_no_known_family_is_refused_and_left_alone():
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.vision_tokens.tiny import TEXT

    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    before = fingerprint(model)
    with pytest.raises(Unsupported, match=r"family 'llama' are not supported; supported: fast_vlm, gemma3, idefics3"):
        mmaccel.apply(model, METHOD)
    assert fingerprint(model) == before
    with pytest.raises(Unsupported, match=r"decorate transformers vision-language models; got str"):
        mmaccel.apply("llava", METHOD)


def test_a_compiled_model_is_refused_with_the_mend(llava):
    compiled = torch.compile(llava)
    with pytest.raises(Unsupported, match=r"apply the method first and compile afterwards"):
        mmaccel.apply(compiled, METHOD)


def test_features_encoded_before_apply_are_refused(llava):
    inputs = prompt_of()
    features = llava.model.get_image_features(inputs["pixel_values"], return_dict=True)
    with mmaccel.applied(llava, METHOD), pytest.raises(Unsupported, match=r"encode the images after mmaccel.apply"):
        llava(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": features})


def test_random_tokens_depend_on_seed_and_picture_only(llava):
    first, second = prompt_of(seed=0), prompt_of(seed=1)
    kept = []
    for inputs, seed in ((first, 0), (first, 0), (first, 1), (second, 0)):
        with mmaccel.applied(llava, RandomTokens(budget=0.25, seed=seed)) as run:
            generated(llava, inputs, 1)
            kept.append(run.report.details["cells"][0])
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[3])
