"""QueCC in a model: what it reads is what calling the pieces by hand gives, whoever calls it and however."""

import copy

import pytest
import torch

import mmaccel
from mmaccel.checks import check
from mmaccel.flops import count_flops
from tests.vision_tokens.product import holds
from tests.vision_tokens.tiny import IMAGE, Prompts, build, inputs_for
from tests.vision_tokens.tiny.weights import quecc_weights
from tests.vision_tokens.usage import answered, assert_beams_score_as_masked, continued, prompt_of
from vision_tokens import DynamicLLaVA, FastV, PrefixKV, QueCC, ToMe
from vision_tokens.laws import generated, kept_prompt, largest_difference, masked_logits
from vision_tokens.query_compressor import QueryCompressor

METHOD = QueCC(weights=quecc_weights())
SEATS = torch.tensor([7, 10, 25, 28])  # the middles of four squares of 3 x 3 cells on a grid of 6 x 6


def pieces(model, inputs):
    """One row with one picture, piece by piece: the embeddings of its prompt with four tokens in it, and positions."""
    body, ids = model.model, inputs["input_ids"]
    start = int((ids == IMAGE).nonzero()[0, 1])
    words = ids[0, start + 36 :]
    question = torch.cat([torch.tensor([1]), words[1:-1]])[None]
    own = 1 if body.config.vision_feature_select_strategy == "default" else 0
    states = body.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    features, levels = states[-2][:, own:], torch.cat([states[1], states[2]], dim=-1)[:, own:]
    asked = body.language_model(input_ids=question).last_hidden_state[:, -1]
    compressor = QueryCompressor.load(METHOD.weights)
    visual = body.multi_modal_projector(compressor(features, levels, asked))
    embed = body.get_input_embeddings()
    embeddings = torch.cat([embed(ids[:, :start]), visual, embed(words[None])], dim=1)
    return embeddings, torch.cat([torch.arange(start), start + SEATS, torch.arange(start + 36, ids.shape[1])])[None]


@torch.no_grad()
def slow_reference(model, inputs, tokens, packed=False):
    """Logits of the next tokens, from embeddings made by hand, without a cache."""
    embeddings, positions = pieces(model, inputs)
    if packed:
        positions = torch.arange(positions.shape[1])[None]
    new = tokens.shape[1] - 1
    embeddings = torch.cat([embeddings, model.get_input_embeddings()(tokens[:, :new])], dim=1)
    positions = torch.cat([positions, positions[:, -1:] + torch.arange(1, new + 1)], dim=1)
    states = model.model.language_model(
        inputs_embeds=embeddings, position_ids=positions, attention_mask=torch.ones_like(positions), use_cache=False
    ).last_hidden_state
    return model.lm_head(states[:, -tokens.shape[1] :])


@pytest.mark.parametrize("family", ["llava", "llava-siglip"])
def test_64_tokens_equal_the_pieces_called_by_hand(family):
    model = build(family)
    inputs = prompt_of(family)
    with mmaccel.applied(model, METHOD) as run:
        tokens, logits = generated(model, inputs, 64)
        assert run.report["visual_tokens"] == 4
    assert largest_difference(logits, slow_reference(model, inputs, tokens)) < 1e-5


def test_packed_positions_are_numbered_anew(llava):
    inputs = prompt_of()
    with mmaccel.applied(llava, QueCC(weights=METHOD.weights, positions="packed")):
        tokens, logits = generated(llava, inputs, 4)
    assert largest_difference(logits, slow_reference(llava, inputs, tokens, packed=True)) < 1e-5


def test_another_question_makes_other_tokens_of_the_same_picture(llava):
    first, second = prompt_of(), prompt_of()
    second["input_ids"][0, -2] = 8
    framed = prompt_of()
    framed["input_ids"][0, -1] = 8  # a token of the template
    with mmaccel.applied(llava, METHOD):
        one, other, same = (kept_prompt(llava, inputs).embeddings for inputs in (first, second, framed))
    visual = (first["input_ids"] == IMAGE)[0]
    assert torch.equal(one[0, visual], same[0, visual])
    assert ((one != other).any(dim=-1)[0, visual]).sum() == 4


def test_pictures_of_a_row_are_made_for_what_follows_the_last(llava):
    inputs = prompt_of(images=(((48, 48), (48, 48)),))
    inputs["pixel_values"][1] = inputs["pixel_values"][0]
    with mmaccel.applied(llava, METHOD):
        prompt = kept_prompt(llava, inputs)
    visual = prompt.embeddings[(inputs["input_ids"] == IMAGE) & prompt.keep]
    torch.testing.assert_close(visual[:4], visual[4:])


def test_a_side_of_padding_changes_nothing(llava):
    found = []
    for side in ("left", "right"):
        inputs = inputs_for("llava", Prompts((((48, 48),), ((48, 48),)), (7, 12), side=side), llava)
        with mmaccel.applied(llava, METHOD):
            prompt = kept_prompt(llava, inputs)
        found.append(prompt.embeddings[(inputs["input_ids"] == IMAGE) & prompt.keep])
    torch.testing.assert_close(*found)


def test_embeddings_in_place_of_tokens_are_read_alike(llava):
    inputs = prompt_of()
    with mmaccel.applied(llava, METHOD), torch.no_grad():
        said = llava(**inputs).logits
        embeddings = llava.get_input_embeddings()(inputs.pop("input_ids"))
        assert torch.equal(llava(**inputs, inputs_embeds=embeddings).logits, said)


def test_encoded_pictures_may_be_asked_twice(llava):
    first, second = prompt_of(), prompt_of(text=(11,))
    second["input_ids"][0, :10] = first["input_ids"][0, :10]
    with mmaccel.applied(llava, METHOD), torch.no_grad():
        said = [llava(**inputs).logits for inputs in (first, second)]
        encoded = {"image": llava.model.get_image_features(first["pixel_values"], return_dict=True)}
        for inputs, expected in zip((first, second), said, strict=True):
            rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
            again = llava(**rest, mm_encoder_outputs=dict(encoded)).logits
            torch.testing.assert_close(again, expected)


def test_every_beam_scores_what_masking_gives_it(llava):
    with mmaccel.applied(llava, METHOD):
        assert_beams_score_as_masked(llava, "llava", Prompts((((48, 48),), ((48, 48), (48, 48))), (7, 12)))


def test_a_second_turn_sees_the_tokens_of_the_first_and_a_second_picture_its_own(llava):
    inputs = prompt_of()
    with mmaccel.applied(llava, METHOD):
        answer, _, cache = answered(llava, inputs, 3)
        more = torch.tensor([[5, *[IMAGE] * 36, 6, 20, 21, 22, 23]])
        second = continued("llava", inputs, answer, more, prompt_of(seed=3)["pixel_values"])
        said, logits, _ = answered(llava, second, 4, past_key_values=cache)
        held = kept_prompt(llava, inputs)
        whole = continued("llava", inputs, answer, more, torch.cat([inputs["pixel_values"], second["pixel_values"]]))
        prompt = kept_prompt(llava, whole)
        first = inputs["input_ids"].shape[1]
        features = prompt.features["image"].pooler_output
        features[0] = held.features["image"].pooler_output[0]  # as the first question made them
        assert largest_difference(logits, masked_logits(llava, prompt, said)) < 1e-5
        assert first < prompt.embeddings.shape[1]


def test_the_laws_hold_with_smaller_squares(llava):
    holds(llava, QueCC(weights=quecc_weights(2)), prompt_of(text=(9,)))


def test_other_methods_do_not_see_the_question_being_read(deep):
    """They act on the same layers, and count the forwards of a prompt."""
    inputs = prompt_of()
    method = QueCC(weights=quecc_weights(2))
    with mmaccel.applied(deep, method) as alone:
        generated(deep, inputs, 3)
    with mmaccel.applied(deep, method, FastV(layer=2, kept_share=0.5), PrefixKV(budget=0.9)) as run:
        generated(deep, inputs, 3)
        assert run.report["question_flops"] == alone.report["question_flops"]
        assert run.report.facts["cuts"] == [{"layer": 2, "visual_tokens": 4}]
    with mmaccel.applied(deep, method, DynamicLLaVA(kept_share=0.5)) as other:
        generated(deep, inputs, 3)
        assert other.report.facts["cuts"] == run.report.facts["cuts"]


def test_what_tome_merged_is_spread_over_the_cells_again(llava):
    inputs = prompt_of()
    with mmaccel.applied(llava, METHOD, ToMe(budget=0.6)):
        tokens, logits = generated(llava, inputs, 4)
    with mmaccel.applied(llava, ToMe(budget=0.6)):
        expected = slow_reference(llava, inputs, tokens)
    assert largest_difference(logits, expected) < 1e-5


def test_check_takes_the_question_off_before_it_compares_with_the_oracle(llava):
    inputs = prompt_of()
    generated(llava, inputs, 1)  # transformers hangs hooks of its own into a model at its first call
    report = check(llava, METHOD, inputs=inputs)
    assert report.laws[-1].law == "time to first token, question and compression aside, over the oracle's"
    assert all(law.passed for law in report.laws[:-1]), str(report)


def test_the_report_counts_and_times_what_the_question_costs(llava):
    inputs = prompt_of(images=(((48, 48),), ((48, 48),)), text=(7, 12))
    compressor, text = QueryCompressor.load(METHOD.weights), copy.deepcopy(llava.model.language_model)
    features, levels, asked = (torch.zeros(2, 36, 32), torch.zeros(2, 36, 64), torch.zeros(2, 32))
    with mmaccel.applied(llava, METHOD) as run:
        generated(llava, inputs, 1)
        words = torch.full((2, 1 + 12 - 2 - 1), 5)  # two stand before the picture, and one is the template's
        assert run.report["question_flops"] == count_flops(lambda: text(input_ids=words, use_cache=False))
        assert run.report["compression_flops"] == count_flops(lambda: compressor(features, levels, asked))
        assert {"question", "compression", "encode", "prefill"} <= run.report.seconds.keys()
    with mmaccel.applied(llava, METHOD) as run:
        generated(llava, inputs_for("llava", Prompts(((),), (7,)), llava), 1)
        assert "question" not in run.report.seconds
