"""What the pocket models reach on held-out scenes: the figures that the training scripts' docstrings quote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPModel

from mmaccel.pocket import world
from mmaccel.pocket.train import drawing
from mmaccel.pocket.train.clip import GRID, describe, other_name, see
from mmaccel.pocket.train.common import PATCH, to_pixels

Item = tuple[world.Image, world.Question]
FALSEHOODS = ("thing", "binding", "count", "relation", "relatum")


def prompts(processor: Any, items: Sequence[Item]) -> list[str]:
    """The chat template around each question."""
    return [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
            add_generation_prompt=True,
        )
        for _, question in items
    ]


@torch.inference_mode()
def answers(model: Any, processor: Any, items: Sequence[Item], batch: int = 50) -> list[str]:
    """What the model answers, greedily, through the processor and `generate`."""
    said = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        inputs = processor(
            images=[image for image, _ in part], text=prompts(processor, part), padding=True, return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        said += processor.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return said


def per_kind(items: Sequence[Item], said: Sequence[str]) -> dict[str, float]:
    """The share of exact answers: for each kind of question, and for all."""
    right = np.array([answer == question.answer for (_, question), answer in zip(items, said, strict=True)])
    kinds = np.array([question.kind for _, question in items])
    return {kind: float(right[kinds == kind].mean()) for kind in world.KINDS} | {"all": float(right.mean())}


@torch.inference_mode()
def answers_from(
    model: Any, processor: Any, items: Sequence[Item], kept_fraction: float, rank: str, batch: int = 50
) -> list[str]:
    """Greedy answers from some of the visual tokens, each at its own position.

    rank: "cls", the CLS attention in the layer that makes the features (of each tile, for LLaVA-NeXT), or "random".
    """
    core, generator = model.model, torch.Generator().manual_seed(0)
    embedding = core.language_model.get_input_embeddings()
    said = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        rows, places = [], []
        for (image, _), prompt in zip(part, prompts(processor, part), strict=True):
            inputs = processor(images=[image], text=[prompt], return_tensors="pt")
            tokens = inputs.input_ids[0]
            tiles = inputs.pixel_values.flatten(0, -4)
            score = see(core.vision_tower, tiles)[1][1][:, 1:, None]
            sizes = {"image_sizes": inputs.image_sizes} if "image_sizes" in inputs else {}
            features = core.get_image_features(inputs.pixel_values, **sizes).pooler_output[0]
            if sizes:  # the family's own packing says where each tile's scores go; newline tokens come last
                last = torch.tensor([-1.0])
                score = core.pack_image_features([score], inputs.image_sizes, "default", last)[0][0]
            score = torch.rand(len(features), generator=generator) if rank == "random" else score.flatten()
            visual = tokens == model.config.image_token_id
            states = embedding(tokens).masked_scatter(visual[:, None], features)
            kept = torch.ones(len(tokens), dtype=torch.bool)
            best = score.topk(round(kept_fraction * len(features))).indices
            kept[visual] = torch.zeros(len(features), dtype=torch.bool).index_fill(0, best, True)
            rows.append(states[kept])
            places.append(kept.nonzero()[:, 0])
        said += [processor.decode(row, skip_special_tokens=True) for row in _decode(model, rows, places)]
    return said


def _decode(model: Any, rows: list[Tensor], places: list[Tensor], most: int = 4) -> list[list[int]]:
    """Greedy decoding of prompts given as embeddings with positions, padded on the left, without a cache."""
    longest, end = max(map(len, rows)), model.config.text_config.eos_token_id
    states = torch.stack([torch.nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
    place = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in places])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    said: list[list[int]] = [[] for _ in rows]
    done = [False] * len(rows)
    for _ in range(most):
        output = model.model.language_model(
            inputs_embeds=states, attention_mask=mask, position_ids=place, use_cache=False
        )
        best = model.lm_head(output.last_hidden_state[:, -1]).argmax(-1)
        for number, token in enumerate(best.tolist()):
            done[number] = done[number] or token == end
            if not done[number]:
                said[number].append(token)
        if all(done):
            break
        states = torch.cat([states, model.get_input_embeddings()(best)[:, None]], dim=1)
        place = torch.cat([place, place[:, -1:] + 1], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return said


@torch.inference_mode()
def coverage(clip: CLIPModel, count: int = 1000) -> dict[str, float]:
    """How well CLS attention finds the things of held-out scenes.

    "mass N": the share of attention on patches that a thing covers by a quarter, in layer N, of all that patches get.
    "kept K": the share of things with such a patch among the K patches of highest attention, and "random K" likewise.
    """
    rng, totals, things = np.random.default_rng(0), dict[str, float](), 0
    pictures = [image for image, _ in world.held_out(count)]
    for start in range(0, count, 50):
        part = pictures[start : start + 50]
        rows = see(clip.vision_model, to_pixels(part))[1]
        for number, image in enumerate(part):
            scene = world.parse(image)
            shown = world.draw(scene, image.shape[:2])[1]
            area = np.stack([shown == thing for thing in range(1, len(scene.things) + 1)])
            covered = area.reshape(-1, GRID, PATCH, GRID, PATCH).mean((2, 4)).reshape(-1, GRID**2) >= 0.25
            things += len(covered)
            for name, row in (("first", rows[0]), ("last", rows[1])):
                score = row[number, 1:].numpy()
                mass = float(score[covered.any(0)].sum() / score.sum())
                totals[f"mass {name}"] = totals.get(f"mass {name}", 0.0) + mass / count
            order = {"kept": (-rows[1][number, 1:].numpy()).argsort(), "random": rng.permutation(GRID**2)}
            for name, best in order.items():
                for kept in (28, 14, 7):
                    key = f"{name} {kept}"
                    totals[key] = totals.get(key, 0.0) + float(covered[:, best[:kept]].any(1).sum())
    return {key: value / (1 if key.startswith("mass") else things) for key, value in totals.items()}


def falsehood(scene: world.Scene, true: str, kind: str, rng: np.random.Generator) -> str | None:
    """A true caption made false by one change, or None where this kind of change does not apply.

    kind: "thing", another colour or shape; "binding", two things exchange their colours; "count", a thing more or fewer
    of a name that is there; "relation", the two exchanged, or another relation; "relatum", one of the two is another
    thing.
    """
    claim = world.read_prompt(true)
    if claim.relation:
        first, second = claim.names
        how = claim.relation
        if kind == "relatum":
            first, second = (first, other_name(second, rng)) if rng.random() < 0.5 else (other_name(first, rng), second)
        elif kind != "relation":
            return None
        elif rng.random() < 0.4:
            first, second = second, first
        else:
            how = str(rng.choice([other for other in world.RELATIONS if other != how]))
        false = f"a {first} {how} a {second}"
        return None if false in world.captions(scene) else false
    names = [thing.name for thing in scene.things]
    place = int(rng.integers(len(names)))
    if kind == "thing":
        names[place] = other_name(names[place], rng)
    elif kind == "binding" and len(names) > 1:
        partner = (place + int(rng.integers(1, len(names)))) % len(names)
        (colour, shape), (other_colour, other_shape) = names[place].split(), names[partner].split()
        names[place], names[partner] = f"{other_colour} {shape}", f"{colour} {other_shape}"
    elif kind == "count":
        if rng.random() < 0.5 and len(names) > 1:
            del names[place]
        else:
            names.insert(place, names[place])
    if Counter(names) == Counter(thing.name for thing in scene.things):
        return None
    return world.captions(world.Scene(tuple(_named(name) for name in names)))[0]


def _named(name: str) -> world.Thing:
    colour, shape = name.split()
    return world.Thing(shape, colour, 0.5, 0.5, 0.1)


@torch.inference_mode()
def matching(clip: CLIPModel, processor: Any, count: int = 500, pixels: int = 96) -> dict[str, float]:
    """How often the true caption of a held-out scene scores above a false one, by kind of falsehood.

    Pictures smaller than 96 pixels show fewer, larger things, and the processor enlarges them.
    """
    rng = np.random.default_rng(world.HELD_OUT_SEEDS[1])
    wins: dict[str, list[bool]] = {kind: [] for kind in FALSEHOODS}
    while min(map(len, wins.values())) < count:
        scene = world.sample_scene(rng, (1, 4), world.SIZES if pixels >= 96 else world.DRAWN)
        true, _ = describe(scene, rng)
        lies = {kind: lie for kind in wins if (lie := falsehood(scene, true, kind, rng)) and len(wins[kind]) < count}
        if lies:
            image = world.render(scene, pixels, texture=pixels >= 96)
            inputs = processor(images=[image], text=[true, *lies.values()], padding=True, return_tensors="pt")
            own, *others = clip(**inputs).logits_per_image[0]
            for kind, other in zip(lies, others, strict=True):
                wins[kind].append(bool(own > other))
    return {kind: float(np.mean(won)) for kind, won in wins.items()}


def of(name: str, weights: Path, count: int = 1000) -> dict[str, dict[str, float]]:
    """All figures of a pocket model, loaded from this folder."""
    if (weights / "model_index.json").exists():
        return drawing.of(name, weights, count // 5)
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(weights)
    if name == "pocket-clip":
        clip: Any = AutoModel.from_pretrained(weights).eval()
        sizes = {f"matching at {pixels} px": matching(clip, processor, count // 2, pixels) for pixels in (96, 32)}
        return {"coverage": coverage(clip, count), **sizes}
    model: Any = AutoModelForImageTextToText.from_pretrained(weights).eval()
    found: dict[str, dict[str, float]] = {}
    tilings = ((96, 96),) if name == "pocket-llava" else ((192, 192), (96, 192), (192, 96), (180, 130))
    for height, width in tilings:
        items = list(world.held_out(count, (height, width)))
        found[f"{height} x {width} dense"] = per_kind(items, answers(model, processor, items))
        for fraction in (0.2, 0.1, 0.05) if height == width else ():
            for rank in ("cls", "random"):
                said = answers_from(model, processor, items, fraction, rank)
                found[f"{height} x {width} {rank} {fraction:.0%}"] = per_kind(items, said)
    return found
