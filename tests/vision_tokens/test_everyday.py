"""What people do with a model whatever the mechanism: it works as without a method, or is refused by name."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.deep import build_deep
from tests.vision_tokens.tiny import Prompts, inputs_for
from tests.vision_tokens.usage import gradients_without_and_with_checkpointing, prompt_of
from vision_tokens import FastV, HiRED, PrefixKV, ShortV, UniformTokens
from vision_tokens.laws import generated, largest_difference

CUT, DROP, EVICT, FREEZE = (
    HiRED(budget=0.25), FastV(budget=0.6, layer=2), PrefixKV(budget=0.4, distance=-3), ShortV(layers=(5, 0, 3)),
)  # fmt: skip
TWO_ROWS = Prompts((((48, 48),), ((48, 48),)), (7, 12))


def each(*methods):
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.name)


@each(CUT, DROP, FREEZE)
def test_a_text_only_prompt_runs_as_the_dense_model(deep, method):
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    _, dense = generated(deep, inputs, 4)
    with mmaccel.applied(deep, method) as run:
        _, ours = generated(deep, inputs, 4)
        assert run.report["images" if method is CUT else "visual_tokens"] == 0
    assert torch.equal(ours, dense)


@each(CUT, DROP, FREEZE)
def test_prompt_lookup_decoding_gives_the_greedy_tokens(deep, method):
    inputs = prompt_of()
    with mmaccel.applied(deep, method):
        greedy, _ = generated(deep, inputs, 12)
        lookup = deep.generate(
            **inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3
        )
    assert torch.equal(lookup[:, -12:], greedy)


def test_guesses_are_refused_where_they_cannot_be_taken_back(deep):
    with mmaccel.applied(deep, EVICT), pytest.raises(ValueError, match=r"cannot be cropped.*prompt_lookup"):
        deep.generate(**prompt_of(), max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)


@each(CUT, DROP)
def test_right_padding_equals_the_unpadded_rows(deep, method):
    batch = inputs_for("llava", Prompts(TWO_ROWS.images, TWO_ROWS.text, side="right"), deep)
    with mmaccel.applied(deep, method), torch.no_grad():
        together = deep(**batch).logits
        for row, pixels in enumerate(batch["pixel_values"].split(1)):
            real = batch["attention_mask"][row].bool()
            alone = deep(input_ids=batch["input_ids"][row : row + 1, real], pixel_values=pixels).logits
            assert 2 + TWO_ROWS.text[row] < alone.shape[1] < int(real.sum())
            assert largest_difference(together[row, : alone.shape[1]], alone[0]) < 1e-5


@pytest.mark.parametrize(
    ("methods", "seen"),
    [
        ((CUT,), lambda report: report.details["cells"][0]),
        ((HiRED(budget=0.75), DROP), lambda report: report.details["layer_columns"][3].index),
        ((HiRED(budget=0.75), DROP, EVICT), lambda report: torch.tensor(report.facts["kv_tokens"])),
        ((FREEZE,), lambda report: torch.tensor(report.facts["frozen_layers"])),
    ],
    ids=lambda value: "-".join(method.name for method in value) if isinstance(value, tuple) else "",
)
def test_four_threads_at_once_get_their_own_answers_and_reports(deep, methods, seen):
    prompts = [prompt_of(seed=seed) for seed in range(4)]

    def run(inputs):
        tokens, logits = generated(deep, inputs, 6)
        return tokens, logits, seen(mmaccel.report(deep))

    mmaccel.apply(deep, *methods)
    alone = [run(inputs) for inputs in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, prompts * 3))
    for (tokens, logits, found), (alone_tokens, alone_logits, expected) in zip(together, alone * 3, strict=True):
        assert torch.equal(tokens, alone_tokens) and torch.equal(found, expected)
        assert largest_difference(logits, alone_logits) < 1e-6


@each(UniformTokens(budget=0.25, positions="packed"), FastV(budget=0.6, positions="packed"))
def test_packed_positions_of_a_padded_batch_equal_the_rows_alone(deep, method):
    with mmaccel.applied(deep, method):
        _, together = generated(deep, inputs_for("llava", TWO_ROWS, deep), 5)
        for row in range(2):
            _, alone = generated(deep, inputs_for("llava", TWO_ROWS.row(row), deep), 5)
            assert largest_difference(alone[0], together[row]) < 1e-5


@each(CUT, DROP)
def test_gradient_checkpointing_gives_the_same_gradients(method):
    model = copy.deepcopy(build_deep("llava")).train()
    with mmaccel.applied(model, method):
        without, checkpointed = gradients_without_and_with_checkpointing(model, prompt_of())
    assert without.abs().sum() > 0
    torch.testing.assert_close(without, checkpointed)


# Refusals


@each(HiRED(positions="packed"), FastV(positions="packed"))
def test_packed_positions_are_refused_for_positions_of_several_axes(method):
    with pytest.raises(Unsupported, match=r"M-RoPE.*use positions='kept'"):
        mmaccel.apply(build_deep("qwen2_5_vl"), method)


@pytest.mark.parametrize("methods", [(CUT,), (DROP,), (EVICT,), (DROP, EVICT)], ids=lambda some: some[-1].name)
def test_chunked_prefill_is_refused_by_name(deep, methods):
    with mmaccel.applied(deep, *methods), pytest.raises(Unsupported, match="prefill_chunk_size"):
        deep.generate(**prompt_of(), max_new_tokens=2, prefill_chunk_size=40)
    assert "_prefill" not in vars(deep)


@each(CUT, DROP, FREEZE)
def test_a_static_cache_is_refused_by_name(deep, method):
    with mmaccel.applied(deep, method), pytest.raises(Unsupported, match=r"static cache.*leave cache_implementation"):
        deep.generate(**prompt_of(), max_new_tokens=2, cache_implementation="static")
    assert deep.generate(**prompt_of(), max_new_tokens=2).shape[1] > 2


@each(CUT, DROP)
def test_labels_and_places_in_the_prompt_are_refused_while_tokens_are_dropped(deep, method):
    inputs = prompt_of()
    with mmaccel.applied(deep, method):
        with pytest.raises(Unsupported, match=f"{method.name} drops tokens, so labels for the whole prompt do not fit"):
            deep(**inputs, labels=inputs["input_ids"])
        with pytest.raises(Unsupported, match=r"do not index its logits; pass logits_to_keep as a number of last"):
            deep(**inputs, logits_to_keep=torch.tensor([3]))
        assert deep(**inputs, logits_to_keep=2).logits.shape[1] == 2
    with mmaccel.applied(deep, type(method)(budget=1.0)):
        assert deep(**inputs, labels=inputs["input_ids"]).loss > 0


@pytest.mark.parametrize("kind", [FastV, PrefixKV])
def test_scores_that_hold_nan_are_refused(deep, kind):
    class Blind(kind):
        def score(self, view):
            return super().score(view) * torch.nan

    with (
        mmaccel.applied(deep, Blind(budget=0.6)),
        pytest.raises(ValueError, match=f"holds NaN, so {kind.name} cannot rank tokens"),
    ):
        generated(deep, prompt_of(), 1)
