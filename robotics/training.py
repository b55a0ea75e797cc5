"""pocket-vla: pocket-llava taught to push discs, by imitating the expert; actions are tokens, as OpenVLA writes them.

Recipe, seeds 51 and 52:
- *tower*, 1000 steps of 32 pictures. Dense supervision as pocket-clip's, on tabletops, where things touch and cover
  each other; and each patch of a thing tells where the thing's centre is in the picture.
- *actions*, 1250 steps, the tower frozen. An answer says where the disc, the square and the pusher are; then which way
  the square lies and where the pusher is, seen from the disc; then the expert's next four actions: each a simple
  function of what was said before it. A step has 192 lessons without a picture, from where things are to the rest;
  every sixth step also 32 pictures with every task that can be set on them. A number's neighbours count as nearly
  right. Three steps with pictures in four keep only a random 5 to 60 % of the visual tokens, but at least one of every
  thing: **the policy has seen missing tokens, as published policies have not**.

Tabletops come from the expert's own ways, led astray by noise, so that the policy learns to come back.

Success on 64 held-out episodes: 87.5 % [78, 95], in 28 steps on average (a miss counts 60), with two actions of each
answer executed.  The expert needs 18; one that sees things .03 of the table off (a standard deviation), in 16 bins, and
acts with an error of .15, succeeds in 60 of 60.

The shipped weights took this way but for two things.  Their language model did not begin as pocket-llava's: it came
from earlier runs, of some 1,500 steps, whose answers had the same places and another expert's targets in place of the
rest; from pocket-llava expect to need more steps.  And the tower was trained in three legs, each with a decay.
Those earlier runs succeeded in 4 of 48 episodes: where the target was a bin off, it could be the place on which the
pusher stood already, and it stood still.  So actions are ways to go, not places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmaccel.pocket import world
from mmaccel.pocket.train.clip import GRID, Dense, View, make_image_processor, owners, see, truth
from mmaccel.pocket.train.common import CHAT_TEMPLATE, PATCH, Recipe, Stage, make_tokenizer, save, to_pixels
from mmaccel.pocket.train.questions import Packed, answer_loss, pack, some_places
from robotics import expert
from robotics.action_tokens import ActionBins
from robotics.pocket import BINS, CHUNK
from robotics.world import COLOURS, PUSHER, STEPS, Physics, Tabletop, Task, Vector, place, sample_tabletop

NEEDED = ("pocket-llava",)
TOWER = Recipe(seed=51, steps=1000, rate=1e-3, warmup=50, decay=0.5)
ACTIONS = Recipe(seed=52, steps=1250, rate=1.5e-3, warmup=30, decay=0.6)
BATCH = 32
LOOK = 6  # steps from one with pictures to the next
PRACTICE, LESSONS = 24, 8  # rows of lessons without pictures in a step, and the lessons in each
POSITIONS = 6  # numbers that such a lesson gives
NEAR = 0.25  # how far from the disc the pusher is still told exactly from it

ANCHORS = 6  # points of the curve along which the numbers' embeddings begin
SOFTNESS = 0.8  # bins, a standard deviation
WORDS = ("push", "onto", "disc", *(f"move{number}" for number in reversed(range(BINS - 1))))


def words(numbers: Vector) -> str:
    """Numbers in [-1, 1], in any shape, as action words in reading order."""
    places = ActionBins(len(WORDS), BINS).tokens(torch.from_numpy(numbers).flatten())
    return " ".join(WORDS[place] for place in places)


@dataclass(frozen=True)
class Sample:
    """A picture, the thing that each patch shows, and what is asked about it."""

    image: world.Image
    owner: np.ndarray  # [144]
    questions: list[world.Question]


def tabletops(rng: np.random.Generator) -> Iterator[Tabletop]:
    """Ever new tabletops: from the expert's ways, led astray by noise that differs from way to way."""
    while True:
        table = sample_tabletop(rng)
        task = Task(int(rng.integers(len(table.discs))), int(rng.integers(len(table.squares))))
        physics, noise, lost = Physics(table), float(rng.choice([0.1, 0.3, 0.6])), np.zeros(2)
        for _ in range(STEPS // 2):
            table = physics.table if rng.random() < 0.7 else near(physics.table, task, rng)
            if task.done(table):
                break
            if rng.random() < 0.25:
                yield table
            if rng.random() < 0.05:
                lost = rng.normal(size=2)
            elif rng.random() < 0.3:
                lost = np.zeros(2)
            physics.step(expert.act(table, task) + noise * rng.normal(size=2) + lost)


def near(table: Tabletop, task: Task, rng: np.random.Generator) -> Tabletop:
    """The same with the pusher somewhere near the task's disc, where most is to be decided."""
    disc, angle = table.discs[task.disc], rng.uniform(0, 2 * np.pi)
    away = (disc.size + table.pusher.size) / 2 + rng.uniform(0, 0.08)
    x, y = np.clip(place(disc) + away * np.array([np.cos(angle), np.sin(angle)]), 0.06, 0.94).tolist()
    return replace(table, pusher=replace(table.pusher, x=x, y=y))


def tasks(table: Tabletop) -> list[Task]:
    """What can still be done on a tabletop."""
    every = [Task(disc, square) for disc in range(len(table.discs)) for square in range(len(table.squares))]
    return [task for task in every if not task.done(table)]


def answer(disc: Vector, square: Vector, pusher: Vector) -> Vector:
    """What the policy is to say, from where things are, all [..., 2]: [..., numbers in [-1, 1]].

    Where they are; which way the square lies, seen from the disc; where the pusher is, seen from the disc, a length of
    1 being `NEAR` and further; and the expert's next actions.
    """
    offset = pusher - disc
    seat = offset / np.maximum(np.sqrt(expert.dot(offset, offset)), NEAR)
    said = [2 * disc - 1, 2 * square - 1, 2 * pusher - 1, expert.unit(square - disc), seat]
    moves = expert.chunk(disc, square, pusher, CHUNK)
    return np.concatenate([*said, moves.reshape(*disc.shape[:-1], 2 * CHUNK)], axis=-1)


def questions(table: Tabletop) -> list[world.Question]:
    """Every task of a tabletop."""
    return [
        world.Question("action", task.instruction(table), words(answer(*expert.where(table, task))))
        for task in tasks(table)
    ]


def imagined(rng: np.random.Generator, count: int) -> tuple[Vector, Vector, Vector]:
    """Where a disc, a square and the pusher may be, [count, 2] each: most pushers near the disc."""
    disc, square = rng.uniform(0.08, 0.92, (count, 2)), rng.uniform(0.14, 0.86, (count, 2))
    way = square - disc
    turn = np.where(rng.random(count) < 0.5, rng.normal(0, 0.5, count), rng.uniform(-np.pi, np.pi, count))
    angle = np.arctan2(-way[:, 1], -way[:, 0]) + turn
    away = expert.CONTACT + rng.uniform(-0.01, 0.08, count)
    near = disc + away[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    anywhere = rng.uniform(0.06, 0.94, (count, 2))
    pusher = np.where((rng.random(count) < 0.6)[:, None], near, anywhere).clip(PUSHER / 2, 1 - PUSHER / 2)
    return disc, square, pusher


def make_samples(rng: np.random.Generator, count: int) -> tuple[list[Sample], list[View]]:
    """Pictures with what is asked about them, and the truth for the dense losses."""
    samples, views, source = [], [], tabletops(rng)
    for _ in range(count):
        table = next(source)
        image, shown = world.draw(table.scene)
        samples.append(Sample(image, owners(shown), questions(table)))
        views.append(View(image, table.scene, True, *truth(table.scene, shown)))
    return samples, views


class Centres(nn.Module):
    """A throw-away head: each patch tells where the centre of its thing is in the picture, across and down.

    A language model that looks at one patch of a thing then need not count patches to know where it is.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.place = nn.Linear(width, 2)
        self.bins = nn.Linear(width, 2 * (BINS - 1))

    def forward(self, states: Tensor, owner: np.ndarray, views: list[View]) -> dict[str, Tensor]:
        """states: of the patches, [images, 144, width]; owner: see `owners`, [images, 144].

        The mean distance, in patches along an axis, and the cross-entropy of the bins.
        """
        row, patch = np.nonzero(owner)
        things = [views[image].scene.things[owner[image, at] - 1] for image, at in zip(row, patch, strict=True)]
        place, states = torch.tensor([(thing.x, thing.y) for thing in things]), self.norm(states[row, patch])
        bins = (place * (BINS - 1)).long().clamp(0, BINS - 2)
        return {
            "place": functional.l1_loss(self.place(states), GRID * (place - 0.5)),
            "bins": functional.cross_entropy(self.bins(states).unflatten(-1, (2, -1)).flatten(0, 1), bins.flatten()),
        }


class Run(nn.Module):
    """The model with its throw-away heads."""

    def __init__(self, llava: Any) -> None:
        super().__init__()
        torch.manual_seed(TOWER.seed)
        self.tokenizer = make_tokenizer(end=False, more=WORDS)
        self.model = adapt(llava, self.tokenizer)
        width = llava.config.vision_config.hidden_size
        self.dense, self.centres = Dense(width), Centres(width)
        self.cache: dict[str, list[int]] = {}
        self.soft = softened(len(self.tokenizer))

    @property
    def vision(self) -> Any:
        tower = self.model.model.vision_tower
        return getattr(tower, "vision_model", tower)

    def stages(self) -> list[Stage]:
        vision, core = self.vision, self.model.model
        seen = [vision.embeddings, vision.pre_layrnorm, *vision.encoder.layers[:-1]]
        return [
            Stage("tower", TOWER, self.tower_losses, [*seen, self.dense, self.centres]),
            Stage("actions", ACTIONS, self.action_losses, [core.multi_modal_projector, core.language_model]),
        ]

    def save(self, folder: Path) -> None:
        from transformers import LlavaProcessor

        processor = LlavaProcessor(
            make_image_processor(),
            self.tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
        )
        save(self.model, processor, folder)

    def tower_losses(self, step: int) -> dict[str, Tensor]:
        samples, views = make_samples(world.train_rng(TOWER.seed, step), BATCH)
        states, attention = see(self.vision, to_pixels([sample.image for sample in samples]))
        owner = np.stack([sample.owner for sample in samples])
        return {**self.dense(states, attention, views), **self.centres(states[:, 1:], owner, views)}

    def action_losses(self, step: int) -> dict[str, Tensor]:
        rng = world.train_rng(ACTIONS.seed, step)
        losses = {"practice": self.practice_loss(rng)}
        return losses if step % LOOK else {"answer": self.picture_loss(rng, step // LOOK), **losses}

    def picture_loss(self, rng: np.random.Generator, number: int) -> Tensor:
        """How far the answers on pictures are from right."""
        samples, _ = make_samples(rng, BATCH)
        with torch.no_grad():
            features = see(self.vision, to_pixels([sample.image for sample in samples]))[0][:, 1:]
        seats = torch.arange(features.shape[1]).expand(BATCH, -1)
        if number % 4:
            seats = some_places(np.stack([sample.owner for sample in samples]), rng)
            features = features.take_along_dim(seats[:, :, None], dim=1)
        packed = pack([sample.questions for sample in samples], self.tokenizer, self.cache)
        return self._loss(self.model.model.multi_modal_projector(features), seats, packed)

    def practice_loss(self, rng: np.random.Generator) -> Tensor:
        """The same without pictures: from where things are, which need not be found out, to what to do.

        The lessons of a row share its instruction, which stands where it stands behind a picture.
        """
        numbers = torch.from_numpy(answer(*imagined(rng, PRACTICE * LESSONS)))
        tokens = ActionBins(len(self.tokenizer), BINS).tokens(numbers).view(PRACTICE, LESSONS, -1)
        inputs, target = tokens[..., :-1].flatten(1), tokens[..., 1:].clone()
        target[..., : POSITIONS - 1] = -100
        segment = torch.arange(1, LESSONS + 1).repeat_interleave(tokens.shape[-1] - 1)
        position = torch.arange(tokens.shape[-1] - 1).repeat(LESSONS)
        packed = Packed(inputs, segment.expand_as(inputs), position.expand_as(inputs), target.flatten(1))
        colours = rng.choice(COLOURS, (PRACTICE, 2))
        asked = torch.tensor(
            [
                self.tokenizer.encode(
                    f"push the {disc} disc onto the {square} square ASSISTANT:", add_special_tokens=False
                )
                for disc, square in colours
            ]
        )
        seats = (GRID**2 + torch.arange(asked.shape[1])).expand_as(asked)
        return self._loss(self.model.get_input_embeddings()(asked), seats, packed)

    def _loss(self, seen: Tensor, seats: Tensor, packed: Packed) -> Tensor:
        language_model = self.model.model.language_model
        before = language_model.get_input_embeddings()(torch.tensor(self.tokenizer.encode("USER:")))
        return answer_loss(language_model, before, seen, seats, packed, soft=self.soft)


def adapt(llava: Any, tokenizer: Any) -> Any:
    """The model with the new words; "disc" begins as "circle", and numbers that follow each other begin alike."""
    llava.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = llava.get_input_embeddings().weight
    with torch.no_grad():
        spread = table[: -len(WORDS)].std()
        table[-len(WORDS) :] = torch.randn(len(WORDS), table.shape[1]) * spread
        anchors = torch.randn(1, table.shape[1], ANCHORS) * spread
        line = functional.interpolate(anchors, BINS - 1, mode="linear", align_corners=True)[0].T
        table[1 - BINS :] += line
        disc, circle = (tokenizer.convert_tokens_to_ids(word) for word in ("disc", "circle"))
        table[disc] = table[circle]
    return llava


def softened(vocabulary: int) -> Tensor:
    """What each token is worth as an answer, by the right one, [vocabulary, vocabulary]: near numbers count, too."""
    soft = torch.eye(vocabulary)
    numbers = torch.arange(BINS - 1)
    near = torch.exp(-((numbers[:, None] - numbers) ** 2) / (2 * SOFTNESS**2))
    soft[1 - BINS :, 1 - BINS :] = near / near.sum(dim=-1, keepdim=True)
    return soft


def figures(weights: Path, episodes: int = 200) -> dict[str, float]:
    """Success, steps and calls of the policy on held-out episodes."""
    from robotics.bench_episodes import compare, measure
    from robotics.bench_settings import settings
    from robotics.pocket import load

    found = compare(measure(load(weights), settings(""), episodes, BATCH, None))
    return {name: found[f"{name}.dense"].value for name in ("success", "steps", "calls")}
