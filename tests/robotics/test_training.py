"""How pocket-vla is trained: labels are the expert's, words are bins, and what is saved is what is loaded."""

import numpy as np
import pytest
import torch

from mmaccel.pocket import world
from mmaccel.pocket.train.common import make_tokenizer
from robotics import expert
from robotics.action_tokens import ActionBins
from robotics.pocket import BINS, CHUNK, THOUGHTS, Prompts, load, look
from robotics.training import WORDS, Run, make_samples, practice, questions, softened, tabletops, tasks, words
from robotics.world import PushWorld, place
from tests.robotics.pushing import make_llava


def test_words_are_what_the_policy_reads_back():
    actions = np.random.default_rng(0).uniform(-1, 1, (CHUNK, 2))
    tokenizer = make_tokenizer(end=False, more=WORDS)
    tokens = torch.tensor(tokenizer.encode(words(actions), add_special_tokens=False))
    read = ActionBins(len(tokenizer), BINS).centres(tokens).view(CHUNK, 2).numpy()
    assert np.abs(read - actions).max() <= 1 / (BINS - 1) + 1e-9


def test_every_task_on_a_table_is_asked_with_where_its_things_are_and_what_the_expert_does():
    rng = np.random.default_rng(1)
    for _, table in zip(range(8), tabletops(rng), strict=False):
        asked = {question.text: question.answer for question in questions(table, rng) if question.kind == "action"}
        assert set(asked) == {task.instruction(table) for task in tasks(table)}
        for task in tasks(table):
            things = (table.discs[task.disc], table.squares[task.square], table.pusher)
            where = " ".join(words(2 * place(thing) - 1) for thing in things)
            does = words(expert.chunk(table, task, CHUNK))
            assert asked[task.instruction(table)] == f"{where} {does}"
            assert len(asked[task.instruction(table)].split()) == THOUGHTS + 2 * CHUNK


def test_practice_needs_no_pictures_and_is_as_long_as_asked():
    rows = practice(np.random.default_rng(0), 2, 5)
    assert [len(row) for row in rows] == [5, 5]
    assert len({(lesson.text, lesson.answer) for row in rows for lesson in row}) > 5


def test_near_numbers_are_worth_something_and_words_only_themselves():
    soft = softened(40)
    assert torch.allclose(soft.sum(dim=-1), torch.ones(40))
    assert torch.equal(soft[: 41 - BINS], torch.eye(40)[: 41 - BINS])
    assert (soft[-1].argsort(descending=True)[:3] == torch.tensor([39, 38, 37])).all()


def test_no_held_out_seed_is_trained_on():
    with pytest.raises(ValueError, match="held out for evaluation"):
        world.train_rng(world.HELD_OUT_SEEDS[0])


def test_both_stages_learn_from_what_they_see():
    run = Run(make_llava()).train()
    for stage in run.stages():
        run.zero_grad()
        losses = stage.losses_at(0)
        sum(losses.values()).backward()
        assert all(torch.isfinite(loss) for loss in losses.values())
        trained = {id(parameter) for part in stage.trained for parameter in part.parameters()}
        moved = {id(parameter) for parameter in run.parameters() if parameter.grad is not None}
        assert moved and moved <= trained


def test_the_same_step_makes_the_same_samples():
    first, second = (make_samples(world.train_rng(3, 7), 3)[0] for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.image, other.image) and one.questions == other.questions


def test_new_words_follow_the_old_ones_and_disc_begins_as_circle():
    llava = make_llava()
    before = llava.get_input_embeddings().weight.detach().clone()
    run = Run(llava)
    table = run.model.get_input_embeddings().weight
    assert torch.equal(table[: len(before)], before) and len(table) == len(before) + len(WORDS)
    disc, circle = (run.tokenizer.convert_tokens_to_ids(word) for word in ("disc", "circle"))
    assert torch.equal(table[disc], table[circle])


def test_a_saved_policy_reads_pictures_and_words_as_the_training_does(tmp_path):
    run = Run(make_llava())
    run.save(tmp_path)
    policy, env = load(tmp_path), PushWorld()
    env.reset(seed=0)
    inputs = policy.prepare(look([env], [0]))
    text = f"{env.instruction} ASSISTANT:"
    expected = [
        *run.tokenizer.encode("USER:"),
        *[run.tokenizer.convert_tokens_to_ids("<image>")] * 144,
        *run.tokenizer.encode(text, add_special_tokens=False),
    ]
    assert inputs["input_ids"].tolist() == [expected]
    assert isinstance(policy.prepare, Prompts)
    from mmaccel.pocket.train.common import to_pixels

    assert torch.allclose(inputs["pixel_values"], to_pixels([env.render()]), atol=1e-5)


def test_what_is_thought_before_the_actions_is_none_of_them(tmp_path):
    Run(make_llava()).save(tmp_path)
    policy, env = load(tmp_path), PushWorld()
    env.reset(seed=0)
    policy.reset()
    inputs = policy.observe(look([env], [0]))
    actions = policy.act(inputs).actions
    assert actions.shape == (1, CHUNK, 2) and policy.places(inputs).action_tokens == THOUGHTS + 2 * CHUNK
    policy.thoughts, policy.horizon = 0, CHUNK + THOUGHTS // 2
    assert torch.equal(policy.act(inputs).actions[:, THOUGHTS // 2 :], actions)
