"""How pocket-vla is trained: labels are the expert's, words are bins, and what is saved is what is loaded."""

import numpy as np
import pytest
import torch

from mmaccel.pocket import world
from mmaccel.pocket.train.common import make_tokenizer
from robotics import expert, training
from robotics.action_tokens import ActionBins
from robotics.pocket import BINS, CHUNK, THOUGHTS, Prompts, load, look
from robotics.training import (
    GRID,
    NEAR,
    POSITIONS,
    WORDS,
    Run,
    answer,
    imagined,
    make_samples,
    questions,
    softened,
    tabletops,
    tasks,
    words,
)
from robotics.world import COLOURS, PushWorld
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
        asked = {question.text: question.answer.split() for question in questions(table)}
        assert set(asked) == {task.instruction(table) for task in tasks(table)}
        for task in tasks(table):
            disc, square, pusher = expert.where(table, task)
            does = words(expert.chunk(disc, square, pusher, CHUNK)).split()
            said = asked[task.instruction(table)]
            assert len(said) == THOUGHTS + 2 * CHUNK and said[THOUGHTS:] == does
            assert (
                said[:POSITIONS] == words(np.concatenate([2 * point - 1 for point in (disc, square, pusher)])).split()
            )


def test_what_is_seen_from_the_disc_is_a_way_and_a_place_near_it():
    disc, square = np.array([0.5, 0.5]), np.array([0.5, 0.9])
    near, far = (answer(disc, square, np.array([0.5 - away, 0.5]))[POSITIONS:THOUGHTS] for away in (NEAR / 2, 0.4))
    assert near == pytest.approx([0, 1, -0.5, 0]) and far == pytest.approx([0, 1, -1, 0])


def test_practice_asks_as_behind_a_picture_without_one(monkeypatch):
    monkeypatch.setattr(training, "PRACTICE", 1)
    monkeypatch.setattr(training, "LESSONS", 2)
    run = Run(make_llava()).eval()
    found = run.practice_loss(np.random.default_rng(3))
    rng = np.random.default_rng(3)
    lessons = answer(*imagined(rng, 2))
    disc, square = rng.choice(COLOURS, 2)
    before, table = len(run.tokenizer.encode("USER:")), run.model.get_input_embeddings().weight
    losses = []
    for lesson in lessons:
        text = f"USER: push the {disc} disc onto the {square} square ASSISTANT: {words(lesson)}"
        tokens = torch.tensor(run.tokenizer.encode(text))
        place = torch.arange(len(tokens))
        place[before:] += GRID**2
        states = run.model.model.language_model(
            inputs_embeds=table[tokens][None],
            attention_mask=torch.ones(1, len(tokens)),
            position_ids=place[None],
            use_cache=False,
        ).last_hidden_state[0]
        asked = len(lesson) - POSITIONS
        logits = states[-asked - 1 : -1] @ table.T
        losses.append(torch.nn.functional.cross_entropy(logits, run.soft[tokens[-asked:]]))
    assert torch.allclose(found, torch.stack(losses).mean(), rtol=1e-5)


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
