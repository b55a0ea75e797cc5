"""The training of Dynamic-LLaVA's predictors: what is decided reaches the loss, and what ships answers questions."""

from pathlib import Path

import pytest
import torch

import mmaccel
from mmaccel.pocket import train, world
from mmaccel.pocket.train.figures import answers
from mmaccel.pocket.train.questions import answer_loss, choose, pack
from vision_tokens import DynamicLLaVA, OutputGate
from vision_tokens.loading import load
from vision_tokens.predictor_training import BATCH, LAYER, TARGETS, Run, answer_words

NOWHERE = Path("nowhere")


@pytest.fixture(scope="module")
def run():
    return Run(train.load("pocket-llava", NOWHERE))


def decided(run, images, words):
    """The loss with predictors that say the same of all tokens, and of the same questions with nothing decided."""
    for predictor, keep in ((run.image_score_predictor, images), (run.output_text_score_predictor, words)):
        last = predictor.output_mlp[-1]
        torch.nn.init.zeros_(last.weight)
        last.bias.data = torch.tensor([50.0, -50.0]) * (1 if keep else -1)
    rng = world.train_rng(5, 0)
    scenes = [world.sample_scene(rng, (1, 3)) for _ in range(BATCH)]
    packed = pack([choose(scene, rng)[:2] for scene in scenes], run.tokenizer, run.cache)
    core = run.model.model
    visual = torch.randn(BATCH, 9, run.model.config.text_config.hidden_size)
    before = core.language_model.get_input_embeddings()(torch.tensor(run.tokenizer.encode("USER:")))
    given = core.language_model, before, visual, torch.arange(9).expand(BATCH, -1), packed
    with torch.no_grad(), run.deciding(len(before), 9, packed, 1.0) as kept:
        loss = answer_loss(*given)
    return loss, kept, given, packed


def test_keeping_everything_costs_what_the_model_alone_costs(run):
    loss, kept, given, _ = decided(run, True, True)
    assert (kept["image"], kept["output"]) == (1, 1)
    with torch.no_grad():
        torch.testing.assert_close(loss, answer_loss(*given), rtol=1e-4, atol=1e-5)


def test_dropped_columns_are_masked_from_the_layer_on(run):
    loss, kept, given, packed = decided(run, False, False)
    assert (kept["image"], kept["output"]) == (0, 0)
    start, length = given[1].shape[0], given[1].shape[0] + 9 + packed.tokens.shape[1]
    gone = torch.zeros(BATCH, length, dtype=torch.bool)
    gone[:, start : start + 9], gone[:, start + 9 :] = True, answer_words(packed)
    hidden = gone[:, None, None] & ~torch.eye(length, dtype=torch.bool)

    def hide(module, args, kwargs):
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"].masked_fill(hidden, -1e9)}

    layers = given[0].layers[LAYER:]
    handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        expected = answer_loss(*given)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


def test_the_answers_words_are_those_that_the_model_wrote(run):
    rng = world.train_rng(5, 1)
    scene = world.sample_scene(rng, (2, 4))
    asked = choose(scene, rng)[:3]
    packed = pack([asked], run.tokenizer, run.cache)
    said = run.tokenizer.decode(packed.tokens[answer_words(packed)])
    assert said == " ".join(question.answer for question in asked)


def test_a_step_moves_both_predictors_and_nothing_else(run):
    losses = run.losses_at(0)
    assert losses.keys() == {"answer", *TARGETS}
    sum(losses.values()).backward()
    moved = {name.split(".")[0] for name, value in run.named_parameters() if value.grad is not None}
    assert moved == {"image_score_predictor", "output_text_score_predictor"}


def test_what_is_saved_is_what_a_method_loads(run, tmp_path):
    assert "pocket-dynamic-llava" in train.trainable()
    run.save(tmp_path)
    states = torch.randn(2, 9, 128)
    for trained in (run.image_score_predictor, run.output_text_score_predictor):
        loaded = type(trained).load(str(tmp_path / "dynamic-llava.safetensors"), 128)
        with torch.no_grad():
            torch.testing.assert_close(loaded(states), trained(states), rtol=1e-2, atol=1e-2)


def test_what_ships_answers_from_a_fifth_of_the_tokens():
    model, processor = load("pocket-llava")
    items = list(world.held_out(20))
    with mmaccel.applied(model, DynamicLLaVA.preset("pocket-llava"), OutputGate.preset("pocket-llava")) as run:
        said = answers(model, processor, items, batch=20)
        assert run.report.facts["cuts"] == [{"layer": 2, "visual_tokens": 20 * 29}]
    assert sum(answer == question.answer for answer, (_, question) in zip(said, items, strict=True)) >= 19
