"""What people do with a vision-language model: it works behind a cut, or refuses by name."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.tiny import Prompts, build, inputs_for, picture, token_types
from vision_tokens import FourierVLM, HiRED, RandomTokens, UniformTokens
from vision_tokens.kept_columns import held_length
from vision_tokens.laws import fingerprint, generated, kept_prompt, largest_difference, masked_logits
from vision_tokens.masks import gather_finished

METHOD = HiRED(budget=0.25)
VARIED = ["gemma3", "internvl", "llava", "llava-mistral", "llava_next", "llava_onevision", "mistral3", "paligemma",
          "paligemma-2", "qwen2_5_vl", "qwen3_vl", "smolvlm"]  # fmt: skip
"""A family of every way to pack tokens, make masks and count positions."""


@pytest.fixture
def llava():
    model = build("llava")
    yield model
    if "_mmaccel_attachment" in vars(model):
        mmaccel.remove(model)


def prompt_of(family="llava", seed=0, **settings):
    return inputs_for(family, Prompts(seed=seed, **settings), build(family))


def continued(inputs, tokens, question):
    """The conversation so far and a new question, as a user's second turn passes it."""
    ids = torch.cat([inputs["input_ids"], tokens, question], dim=1)
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", VARIED)
def test_a_second_turn_on_a_kept_cache_equals_masking(family):
    model, question = build(family), torch.tensor([[11, 12, 13, 14]])
    inputs = prompt_of(family)
    with mmaccel.applied(model, METHOD):
        prompt = kept_prompt(model, inputs)
        first = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        answer = first.sequences[:, -5:]
        second = continued(inputs, answer, question)
        for name in ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images"):
            second.pop(name, None)
        second |= token_types(family, second["input_ids"])
        out = model.generate(
            **second, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        tokens = torch.cat([answer, question, out.sequences[:, -5:]], dim=1)
        reference = masked_logits(model, prompt, tokens)[:, -5:]
    assert largest_difference(torch.stack(out.logits, dim=1), reference) < 1e-5


@pytest.mark.parametrize(("family", "tokens"), [("llava", 36), ("gemma3", 9), ("llava-mistral", 36)])
def test_a_second_turn_with_a_new_image_cuts_it_too(family, tokens):
    model, inputs, later = build(family), prompt_of(family), picture(5, 5, (1, 3, 48, 48))
    question = torch.tensor([[11, 5, *[99] * tokens, 6, 12]])
    with mmaccel.applied(model, METHOD) as run:
        first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        answer, cache = first.sequences[:, -4:], first.past_key_values
        before = held_length(cache)
        second = {**continued(inputs, answer, question), "pixel_values": later}
        second |= token_types(family, second["input_ids"])
        out = model.generate(
            **second, past_key_values=cache, max_new_tokens=4, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert run.report["visual_tokens"] == tokens // 4
        assert held_length(cache) == before + 1 + 4 + tokens // 4 + 3  # a token not cached yet, text, the image, answer
        both = {**second, "pixel_values": torch.cat([inputs["pixel_values"], later])}
        reference = masked_logits(model, kept_prompt(model, both), out.sequences[:, -4:])
    assert largest_difference(torch.stack(out.logits, dim=1), reference) < 1e-5


@pytest.mark.parametrize("family", ["llava", "gemma3", "llava-mistral"])
def test_an_image_in_a_second_turn_only_is_cut(family):
    """The cache of the first turn was never cut, so nothing was remembered of it."""
    model, places = build(family), 9 if family == "gemma3" else 36
    inputs = inputs_for(family, Prompts(((),), (30,)), model)
    question = torch.tensor([[11, 5, *[99] * places, 6, 12]])
    with mmaccel.applied(model, METHOD):
        first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        second = continued(inputs, first.sequences[:, -4:], question)
        second |= {"pixel_values": picture(5, 5, (1, 3, 48, 48)), **token_types(family, second["input_ids"])}
        out = model.generate(
            **second, past_key_values=first.past_key_values, max_new_tokens=12, min_new_tokens=12, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        reference = masked_logits(model, kept_prompt(model, second), out.sequences[:, -12:])
    assert largest_difference(torch.stack(out.logits, dim=1), reference) < 1e-5


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
        cache = llava.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        ).past_key_values
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
    inputs = inputs_for(family, prompts, model)
    with mmaccel.applied(model, METHOD):
        out = model.generate(
            **inputs, num_beams=4, num_return_sequences=4, length_penalty=0.0, max_new_tokens=6, min_new_tokens=6,
            do_sample=False, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        for row in range(2):
            prompt = kept_prompt(model, inputs_for(family, prompts.row(row), model))
            for beam in range(4 * row, 4 * row + 4):
                tokens = out.sequences[beam : beam + 1, -6:]
                chances = masked_logits(model, prompt, tokens).log_softmax(-1).gather(-1, tokens[..., None])
                torch.testing.assert_close(chances.sum(), out.sequences_scores[beam], rtol=1e-5, atol=1e-4)


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


def test_right_padding_equals_the_unpadded_rows(llava):
    batch = inputs_for("llava", Prompts((((48, 48),), ((48, 48),)), (7, 12), side="right"), llava)
    with mmaccel.applied(llava, METHOD), torch.no_grad():
        together = llava(**batch).logits
        for row, length in ((0, 9 + 2 + 7), (1, 9 + 2 + 12)):
            real = batch["attention_mask"][row].bool()
            alone = llava(
                input_ids=batch["input_ids"][row : row + 1, real], pixel_values=batch["pixel_values"][row : row + 1]
            ).logits
            assert alone.shape[1] == length
            assert largest_difference(together[row, :length], alone[0]) < 1e-5


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


def test_packed_positions_of_a_padded_batch_equal_the_rows_alone(llava):
    prompts = Prompts((((48, 48),), ((48, 48),)), (7, 12))
    with mmaccel.applied(llava, UniformTokens(budget=0.25, positions="packed")):
        _, together = generated(llava, inputs_for("llava", prompts, llava), 5)
        for row in range(2):
            _, alone = generated(llava, inputs_for("llava", prompts.row(row), llava), 5)
            assert largest_difference(alone[0], together[row]) < 1e-5


def test_packed_positions_are_refused_for_positions_of_several_axes():
    with pytest.raises(Unsupported, match=r"M-RoPE.*use positions='kept'"):
        mmaccel.apply(build("qwen2_5_vl"), HiRED(positions="packed"))


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


def test_prompt_lookup_decoding_gives_the_greedy_tokens(llava):
    inputs = prompt_of()
    with mmaccel.applied(llava, METHOD):
        greedy, _ = generated(llava, inputs, 12)
        lookup = llava.generate(
            **inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3
        )
    assert torch.equal(lookup[:, -12:], greedy)


def test_four_threads_at_once_get_their_own_answers_and_reports(llava):
    prompts = [prompt_of(seed=seed) for seed in range(4)]
    mmaccel.apply(llava, METHOD)
    alone = [generated(llava, inputs, 8) for inputs in prompts]

    def run(index):
        outs = [generated(llava, prompts[index], 8) for _ in range(4)]
        return outs, mmaccel.report(llava).details["cells"][0]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(4)))
    for (outs, cells), (tokens, logits), inputs in zip(results, alone, prompts, strict=True):
        for ours, ours_logits in outs:
            assert torch.equal(ours, tokens)
            assert largest_difference(ours_logits, logits) < 1e-6
        generated(llava, inputs, 1)
        assert torch.equal(mmaccel.report(llava).details["cells"][0], cells)


def test_a_text_only_prompt_runs_as_the_dense_model(llava):
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    _, dense = generated(llava, inputs, 4)
    with mmaccel.applied(llava, METHOD) as run:
        _, ours = generated(llava, inputs, 4)
        assert run.report["images"] == 0
    assert torch.equal(ours, dense)


def test_copies_pickles_and_saved_folders_are_plain(tmp_path):
    model, inputs = build.__wrapped__("llava"), prompt_of()  # transformers' own hooks after a call cannot be pickled
    mmaccel.apply(model, METHOD)
    thawed, twin = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path).eval()
    _, decorated = generated(model, inputs, 3)
    _, dense = generated(mmaccel.remove(model), inputs, 3)
    assert not torch.equal(decorated, dense)
    for plain in (twin, thawed, saved):
        with pytest.raises(ValueError, match="no method is applied"):
            mmaccel.report(plain)
        assert all(map(torch.equal, plain.parameters(), model.parameters()))
        assert largest_difference(generated(plain, inputs, 3)[1], dense) < 1e-6


@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_applying_again_replaces(llava, budget):
    inputs = prompt_of()
    mmaccel.apply(llava, HiRED(budget=0.9))
    mmaccel.apply(llava, HiRED(budget=budget))
    generated(llava, inputs, 1)
    assert mmaccel.report(llava)["visual_tokens"] == int(36 * budget)
    mmaccel.remove(llava)


def test_two_methods_that_fight_are_refused_and_the_first_stays(llava):
    mmaccel.apply(llava, HiRED())
    with pytest.raises(ValueError, match=r"hired and fourier-vlm both act on the stage 'prefill'.*mmaccel.remove"):
        mmaccel.apply(llava, FourierVLM())
    generated(llava, prompt_of(), 1)
    assert mmaccel.report(llava).methods[0]["method"] == "hired"


def test_removing_after_somebody_else_patched_on_top_names_them(llava):
    before = fingerprint(llava)
    mmaccel.apply(llava, METHOD)
    ours = llava.model.get_image_features

    def patched_by_somebody(*args, **kwargs):
        return ours(*args, **kwargs)

    llava.model.get_image_features = patched_by_somebody
    with pytest.raises(RuntimeError, match=r"LlavaModel.get_image_features.*patched_by_somebody"):
        mmaccel.remove(llava)
    llava.model.get_image_features = ours
    mmaccel.remove(llava)
    assert fingerprint(llava) == before


def test_labels_are_refused_while_tokens_are_dropped(llava):
    inputs = prompt_of()
    with mmaccel.applied(llava, METHOD), pytest.raises(Unsupported, match=r"labels for the whole prompt do not fit"):
        llava(**inputs, labels=inputs["input_ids"])
    with mmaccel.applied(llava, HiRED(budget=1.0)):
        assert llava(**inputs, labels=inputs["input_ids"]).loss > 0


def test_a_static_cache_is_refused_by_name(llava):
    with mmaccel.applied(llava, METHOD), pytest.raises(Unsupported, match=r"static cache.*leave cache_implementation"):
        llava.generate(**prompt_of(), max_new_tokens=2, cache_implementation="static")
    assert llava.generate(**prompt_of(), max_new_tokens=2).shape[1] > 2


def test_chunked_prefill_is_refused_by_name(llava):
    with mmaccel.applied(llava, METHOD), pytest.raises(Unsupported, match=r"prefill_chunk_size"):
        llava.generate(**prompt_of(), max_new_tokens=2, prefill_chunk_size=16)


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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text", [(7,), (7, 12)], ids=["one", "batch"])
def test_windows_shorter_than_the_prompt_lie_on_original_places(attention, text):
    """A language model whose every layer looks back 16 places, in the prefill and in every later step."""
    model = build("llava-mistral", attention)
    inputs = inputs_for("llava-mistral", Prompts((((96, 70),), ((64, 96), (48, 48)))[: len(text)], text), model)
    with mmaccel.applied(model, METHOD):
        tokens, logits = generated(model, inputs, 24)
        reference = masked_logits(model, kept_prompt(model, inputs), tokens)
        assert largest_difference(logits, reference) < 1e-5
        _, anew = generated(model, {**inputs, "use_cache": False}, 24)
        assert largest_difference(logits, anew) < 1e-5


def test_windows_refuse_packed_positions_and_kernels_without_masks():
    with pytest.raises(Unsupported, match=r"look back a number of original places.*use positions='kept'"):
        mmaccel.apply(build("llava-mistral"), HiRED(positions="packed"))
    flash, index = SimpleNamespace(_attn_implementation="flash_attention_2"), torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(Unsupported, match=r"which flash_attention_2 does not take; load the model with attn_impl"):
        gather_finished({"sliding_attention": None}, flash, None, index, index)


def test_a_window_that_padding_made_too_short_is_refused():
    """Padding on the right stands between a prompt and what follows it, in a row that kept fewer tokens."""
    model = build("llava-mistral")
    prompts = Prompts((((48, 48), (48, 48)), ((48, 48),)), (3, 42), side="right")
    inputs = inputs_for("llava-mistral", prompts, model)
    with mmaccel.applied(model, METHOD), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=-1)
        with pytest.raises(Unsupported, match=r"let go of tokens that a row still needs.*pad prompts on the left"):
            model(input_ids=torch.tensor([[3], [4]]), attention_mask=mask, past_key_values=cache)
