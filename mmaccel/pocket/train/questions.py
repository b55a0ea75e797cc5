"""How a language model learns to answer: several questions packed behind one picture, none seeing another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmaccel.pocket import world

QUESTIONS = 8  # behind one picture


def choose(scene: world.Scene, rng: np.random.Generator) -> list[world.Question]:
    """Up to eight questions about a scene, the kinds in turn; two places each turn, for they are the hardest."""
    asked: dict[str, list[world.Question]] = {kind: [] for kind in world.KINDS}
    for question in world.questions(scene, rng):
        asked[question.kind].append(question)
    turns = []
    for _ in range(QUESTIONS):
        for kind, number in (("place", 2), ("count", 1), ("shape", 1), ("colour", 1)):
            turns += asked[kind][:number]
            asked[kind] = asked[kind][number:]
    return turns[:QUESTIONS]


def some_places(owner: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Patch dropout: the visual tokens that stay, 5 to 60 % of them, in reading order: [rows, kept].

    owner: the thing that each token shows, 0 for none, [rows, tokens].  They stay at random, except that each thing
    keeps one: a question about a thing that cannot be seen would teach to guess.
    """
    luck = rng.random(owner.shape)
    for row, numbers in enumerate(owner):
        for thing in np.unique(numbers[numbers > 0]):
            luck[row, rng.choice(np.flatnonzero(numbers == thing))] = -1
    kept = max(int(rng.uniform(0.05, 0.6) * owner.shape[1]), int((luck < 0).sum(1).max()))
    return torch.from_numpy(np.sort(luck.argsort(1)[:, :kept], axis=1))


@dataclass(frozen=True)
class Packed:
    """What follows the visual tokens of each row.  All [rows, length], padded at the end.

    segment: 1, 2, ... numbers the questions, 0 is padding; position: from 0, again for each question; target: the token
    to be predicted at this place, -100 where none is.
    """

    tokens: Tensor
    segment: Tensor
    position: Tensor
    target: Tensor


def pack(rows: list[list[world.Question]], tokenizer: Any, cache: dict[str, list[int]]) -> Packed:
    """Tokenise and pack questions with their answers; `cache` keeps what was tokenised before."""

    def encode(text: str) -> list[int]:
        if text not in cache:
            cache[text] = tokenizer.encode(text, add_special_tokens=False)
        return cache[text]

    packed: list[list[tuple[int, int, int, int]]] = []
    for questions in rows:
        row = []
        for number, question in enumerate(questions, 1):
            prompt = encode(f"{question.text} ASSISTANT:")
            tokens = [*prompt, *encode(question.answer), *encode("<eos>")]
            targets = [-100] * (len(prompt) - 1) + tokens[len(prompt) :] + [-100]
            row += [(token, number, place, targets[place]) for place, token in enumerate(tokens[:-1])]
        packed.append(row)
    length = max(len(row) for row in packed)
    table = torch.tensor([row + [(0, 0, 0, -100)] * (length - len(row)) for row in packed])
    return Packed(*table.unbind(-1))


def answer_loss(
    language_model: Any,
    before: Tensor,
    visual: Tensor,
    place: Tensor,
    packed: Packed,
    seen: Tensor | None = None,
    soft: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the answers, given what precedes the picture and its visual tokens.

    before: embeddings of the prompt up to the picture, [length, width]; visual: [rows, tokens, width] with their places
    within the picture, [rows, tokens]; seen: which of the visual tokens are real, all if None; soft: what each token is
    worth as an answer, by the right one, [vocabulary, vocabulary], if others than that one are worth something.
    A question sees the picture and itself, and its positions go on right behind the picture's last place, as they do
    when it is asked alone.
    """
    embedding = language_model.get_input_embeddings()
    rows, start = len(visual), len(before)
    ends = start + place.amax(1, keepdim=True) + 1
    states = torch.cat([before.expand(rows, -1, -1), visual, embedding(packed.tokens)], dim=1)
    head = torch.arange(start).expand(rows, -1)
    position = torch.cat([head, start + place, ends + packed.position], dim=1)
    seen = torch.ones(visual.shape[:2], dtype=torch.bool) if seen is None else seen
    prefix = torch.cat([torch.ones(rows, start, dtype=torch.bool), seen], dim=1)
    segment = torch.cat([torch.where(prefix, 0, -1), torch.where(packed.segment > 0, packed.segment, -1)], dim=1)
    query, key = segment[:, :, None], segment[:, None, :]
    order = torch.arange(segment.shape[1])
    mask = (order[:, None] >= order) & ((key == 0) | (key == query)) & (key >= 0)
    mask |= torch.eye(segment.shape[1], dtype=torch.bool)  # padding sees itself, or its softmax is not a number
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None]
    output = language_model(inputs_embeds=states, attention_mask=bias, position_ids=position, use_cache=False)
    asked = packed.target >= 0
    answers = output.last_hidden_state[:, -packed.tokens.shape[1] :][asked]
    target = packed.target[asked]
    return functional.cross_entropy(answers @ embedding.weight.T, target if soft is None else soft[target])
