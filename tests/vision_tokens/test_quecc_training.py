"""The training of QueCC's compressors: it learns from what the method makes, and what ships answers questions."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional

import mmaccel
from mmaccel.pocket import train, world
from mmaccel.pocket.train.common import to_pixels
from mmaccel.pocket.train.figures import answers, prompts
from mmaccel.pocket.train.questions import choose
from vision_tokens import QueCC
from vision_tokens.loading import load
from vision_tokens.quecc_training import LEVELS, QUESTIONS, RECIPES, Run, best_of_squares, some

NOWHERE = Path("nowhere")


@pytest.fixture(scope="module")
def run():
    return Run(train.load("pocket-llava", NOWHERE))


@pytest.mark.parametrize("kernel", RECIPES)
def test_the_answers_cost_what_the_decorated_model_pays_for_them(run, tmp_path, kernel):
    run.save(tmp_path)
    model, processor = load("pocket-llava")
    (picture, question) = next(iter(world.held_out(1)))
    answer = run.tokenizer(question.answer + "<eos>", add_special_tokens=False, return_tensors="pt").input_ids
    inputs = processor(
        images=Image.fromarray(picture), text=prompts(processor, [(picture, question)]), return_tensors="pt"
    )
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer[:, :-1]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    said = answer.shape[1]
    method = QueCC(weights=str(tmp_path / f"quecc-{(12 // kernel) ** 2}.safetensors"), template=(0, said + 1))
    with torch.no_grad():
        with mmaccel.applied(model, method):
            logits = model(**inputs).logits[0, -said:]
        states = run.model.model.vision_tower(to_pixels([picture]), output_hidden_states=True).hidden_states
        levels = torch.cat([states[level][:, 1:] for level in LEVELS], dim=-1)
        compressor = run.compressors[f"kernel_{kernel}"]
        made = compressor(states[-2][:, 1:], levels, run.read([question.text]))
        loss = run.answer(run.model.model.multi_modal_projector(made), kernel, [question])
    torch.testing.assert_close(loss, functional.cross_entropy(logits, answer[0]), rtol=1e-2, atol=1e-3)  # halves


def test_a_step_moves_one_compressor_and_nothing_else(run):
    losses = run.losses_at(4, 0)
    assert losses.keys() == {"answer", "feature"}
    sum(losses.values()).backward()
    moved = {name.split(".")[1] for name, value in run.named_parameters() if value.grad is not None}
    assert moved == {"kernel_4"}


def test_each_compressor_goes_on_from_the_one_before(run):
    stages = run.stages()
    first = next(stages).trained[0]
    second = next(stages).trained[0]
    assert torch.equal(first.v_proj[0].weight, second.v_proj[0].weight)
    assert first.q_downsample.weight.shape != second.q_downsample.weight.shape
    assert first.v_proj[0].weight is not second.v_proj[0].weight
    assert [stage.recipe for stage in run.stages()] == list(RECIPES.values())


def test_of_each_square_the_place_with_the_largest_share_is_taken():
    features, share = torch.randn(2, 144, 5), torch.rand(2, 144)
    best = best_of_squares(features, share, 4)
    for row in range(2):
        for square in range(9):
            cells = [
                (square // 3 * 4 + down) * 12 + square % 3 * 4 + across for down in range(4) for across in range(4)
            ]
            place = max(cells, key=lambda cell: share[row, cell].item())
            assert torch.equal(best[row, square], features[row, place])


def test_questions_of_every_kind_are_asked():
    rng = world.train_rng(5, 0)
    asked = [some(choose(world.sample_scene(rng, (2, 4)), rng), rng) for _ in range(40)]
    assert max(map(len, asked)) == QUESTIONS
    assert {question.kind for own in asked for question in own} == set(world.KINDS)


@pytest.mark.parametrize(("budget", "tokens"), [(0.25, 36), (0.2, 16), (9, 9)])
def test_what_ships_answers_from_the_most_tokens_that_a_budget_has_room_for(budget, tokens):
    assert "pocket-quecc" in train.trainable()
    model, processor = load("pocket-llava")
    items = list(world.held_out(20))
    with mmaccel.applied(model, QueCC(budget=budget)) as run:
        said = answers(model, processor, items, batch=20)
        assert run.report["visual_tokens"] == 20 * tokens
    assert sum(answer == question.answer for answer, (_, question) in zip(said, items, strict=True)) >= 19
