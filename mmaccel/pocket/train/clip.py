"""pocket-clip: a `CLIPModel` of 1.5 M parameters that sees 96 px scenes as 144 patches.

Recipe, seeds 1 and 11:
- *tower*, 1400 steps of 48 pictures. Dense supervision of `hidden_states[-2]`, which LLaVA reads: each patch tells the
  class under it (empty weighs 0.2), whether it holds the centre of a thing, and its ninth of the picture; the CLS token
  counts every class, colour and shape. In the layer that makes these features, and weakly in the first, a small loss
  makes the CLS token pay every thing an equal share of attention, around its centre. **Its attention is therefore a
  better guide to what matters than a tower trained on captions alone would give**: methods that rank by it look good
  here.
- *captions*, 700 steps of 128 pictures. The tower rests; the last layer and the text model learn the symmetric
  contrastive loss, with a false caption beside each true one.

A quarter of the pictures are drawn at 32 to 64 px and enlarged, a tenth are tiles of larger ones, a tenth are squashed.

`mmaccel.pocket.train.figures.of("pocket-clip", mmaccel.pocket.path("pocket-clip"))` measures the figures.

Reached on 1000 held-out scenes: 99.9 % of the things keep a patch when the 28 or 14 patches of highest CLS attention
are kept, 99.3 % with 7 (at random 45, 26 and 14 %); patches that show a thing get 78 % of the attention (79 % in the
first layer).

A true caption beats a false one of each kind (300 each), in %, on scenes of one to four things drawn at 96 and 32 px:

|       | another thing | colours exchanged | one more or fewer | a relation's other thing | another relation |
| 96 px |          99.3 |               100 |              97.0 |                     96.0 |             55.0 |
| 32 px |          99.0 |              99.3 |              97.3 |                     98.0 |             49.0 |

Trust it with what is there, not with where: relations ("left of") are guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pictures
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmaccel.pocket import world
from mmaccel.pocket.train.common import (
    MEAN,
    PATCH,
    PIXELS,
    SPREAD,
    Recipe,
    Stage,
    initialise,
    make_tokenizer,
    save,
    to_pixels,
)

GRID = PIXELS // PATCH
CLASSES = tuple(f"{colour} {shape}" for colour in world.COLOURS for shape in world.SHAPES)
COUNTED = (*CLASSES, *world.COLOURS, *world.SHAPES)  # what the CLS token counts, up to three
TOWER = Recipe(seed=1, steps=1400, decay=0.25)
CAPTIONS = Recipe(seed=11, steps=700)
TOWER_BATCH, CAPTIONS_BATCH = 48, 128


@dataclass(frozen=True)
class View:
    """A training picture and the truth about it."""

    image: world.Image  # [96, 96, 3]
    scene: world.Scene
    whole: bool  # the picture shows the whole scene
    patch_class: np.ndarray  # [144], 0 is empty, else 1 + index in CLASSES
    centre: np.ndarray  # [144], 1 where a thing has its centre
    share: np.ndarray  # [144], the attention that the CLS token should pay
    counts: np.ndarray  # [34], 0 to 3


def sample_view(rng: np.random.Generator) -> View:
    """A scene as it comes (55 %), small and resized up (25 %), a tile of a larger one (10 %), or squashed (10 %)."""
    chance, whole = rng.random(), True
    if chance < 0.55:
        scene = world.sample_scene(rng)
        image, shown = world.draw(scene)
    elif chance < 0.8:
        pixels = int(rng.integers(32, 65))
        sizes = (0.2, 0.36) if pixels < 48 else (0.13, 0.25)
        scene = world.sample_scene(rng, (1, 3), sizes)
        image, shown = world.draw(scene, pixels, texture=bool(rng.random() < 0.5))
    elif chance < 0.9:
        scene, whole = world.sample_scene(rng, (4, 9), (0.0575, 0.0885)), False
        image, shown = world.draw(scene, 2 * PIXELS)
        row, column = rng.integers(0, PIXELS + 1, 2)
        image, shown = (
            image[row : row + PIXELS, column : column + PIXELS],
            shown[row : row + PIXELS, column : column + PIXELS],
        )
    else:
        scene = world.sample_scene(rng, (1, 6), (0.07, 0.14), float(np.exp(rng.uniform(-0.7, 0.7))))
        image, shown = world.draw(scene, int(rng.integers(PIXELS, 2 * PIXELS + 1)))
    if image.shape[:2] != (PIXELS, PIXELS):
        image = np.asarray(Pictures.fromarray(image).resize((PIXELS, PIXELS), Pictures.Resampling.BICUBIC))
        shown = np.asarray(Pictures.fromarray(shown).resize((PIXELS, PIXELS), Pictures.Resampling.NEAREST))
    return View(image, scene, whole, *truth(scene, shown))


def truth(scene: world.Scene, shown: world.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Targets of the dense losses, see `View`.  shown: which thing each pixel shows, [96, 96]."""
    numbers = np.arange(1, len(scene.things) + 1, dtype=np.uint8)
    area = (shown[None] == numbers[:, None, None]).reshape(-1, GRID, PATCH, GRID, PATCH).sum((2, 4))
    seen = area.sum((1, 2)) >= 8  # pixels
    area, things = area[seen], [thing for thing, visible in zip(scene.things, seen, strict=True) if visible]
    patch_class = np.zeros((GRID, GRID), np.int64)
    centre = np.zeros((GRID, GRID), np.float32)
    share = np.zeros((GRID, GRID), np.float32)
    counts = np.zeros(len(COUNTED), np.int64)
    if things:
        labels = np.array([1 + CLASSES.index(thing.name) for thing in things])
        patch_class = np.where(area.max(0) >= 6, labels[area.argmax(0)], 0)
        places = np.arange(GRID) + 0.5
        mass = area.sum((1, 2))
        rows, columns = (area.sum(2) @ places) / mass, (area.sum(1) @ places) / mass
        centre[rows.astype(int), columns.astype(int)] = 1
        distance = (places[None, :, None] - rows[:, None, None]) ** 2 + (places - columns[:, None])[:, None, :] ** 2
        weight = np.exp(-distance / (2 * 0.6**2)) * (area > 0)
        share = (weight / weight.sum((1, 2), keepdims=True)).mean(0)
        for thing in things:
            for name in (thing.name, thing.colour, thing.shape):
                counts[COUNTED.index(name)] += 1
    return patch_class.ravel(), centre.ravel(), share.ravel(), counts.clip(max=3)


def owners(shown: world.Image) -> np.ndarray:
    """The thing that covers most of each patch, and at least 12 of its 64 pixels, else 0: [144] from [96, 96]."""
    numbers = np.arange(1, int(shown.max()) + 1, dtype=np.uint8)
    area = (
        (shown[None] == numbers[:, None, None]).reshape(-1, GRID, PATCH, GRID, PATCH).sum((2, 4)).reshape(-1, GRID**2)
    )
    area = np.concatenate([np.full((1, GRID**2), 11), area])
    return np.asarray(area.argmax(0))


class Dense(nn.Module):
    """Throw-away heads on `hidden_states[-2]`: they shape the features that LLaVA reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, len(CLASSES) + 1 + 1 + 9)
        self.cls = nn.Linear(width, len(COUNTED) * 4)

    def forward(self, states: Tensor, attention: list[Tensor], views: list[View]) -> dict[str, Tensor]:
        """states: hidden_states[-2], [images, 145, width]; attention: CLS rows of two layers, [images, 145] each."""
        states = self.norm(states)
        classes, centre, region = self.patch(states[:, 1:]).split([len(CLASSES) + 1, 1, 9], dim=-1)
        weight = torch.ones(len(CLASSES) + 1)
        weight[0] = 0.2
        target = torch.from_numpy(np.stack([view.patch_class for view in views]))
        third = torch.arange(GRID) // (GRID // 3)
        regions = (3 * third[:, None] + third).flatten().expand(len(views), -1)
        centres = torch.from_numpy(np.stack([view.centre for view in views]))
        whole = torch.tensor([view.whole for view in views])
        counts = torch.from_numpy(np.stack([view.counts for view in views]))[whole]
        counted = self.cls(states[whole, 0]).unflatten(-1, (4, len(COUNTED)))
        share = torch.from_numpy(np.stack([view.share for view in views])).float()
        spread = [-(share * row[:, 1:].clamp_min(1e-6).log()).sum(1).mean() for row in attention]
        return {
            "class": functional.cross_entropy(classes.transpose(1, 2), target, weight),
            "centre": functional.binary_cross_entropy_with_logits(
                centre[..., 0], centres, pos_weight=torch.tensor(5.0)
            ),
            "region": 0.1 * functional.cross_entropy(region.transpose(1, 2), regions),
            "counts": functional.cross_entropy(counted, counts, torch.tensor([0.3, 1.0, 1.0, 1.0])),
            "attention": 0.2 * spread[1],
            "first attention": 0.05 * spread[0],
        }


def cls_attention(layer: Any, states: Tensor) -> Tensor:
    """Attention of the CLS token in an encoder layer, averaged over heads: [images, 145] from the layer's input."""
    attention = layer.self_attn
    states = layer.layer_norm1(states)
    query = attention.q_proj(states[:, :1]).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    key = attention.k_proj(states).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    scores: Tensor = query @ key.mT * attention.scale
    return scores.softmax(-1).mean((1, 2))


def see(vision: Any, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """hidden_states[-2], and the CLS attention of the first layer and of the layer that makes hidden_states[-2]."""
    states, rows = vision.pre_layrnorm(vision.embeddings(pixels)), []
    layers = vision.encoder.layers[:-1]
    for number, layer in enumerate(layers):
        if number in (0, len(layers) - 1):
            rows.append(cls_attention(layer, states))
        states = layer(states, attention_mask=None)
    return states, rows


def describe(scene: world.Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A true caption, and the same with one thing or the relation changed so that it is false."""
    said = world.captions(scene)
    if len(said) > 1 and rng.random() < 0.5:
        true = said[rng.integers(1, len(said))]
        first, relation, second = next(true.partition(f" {how} ") for how in world.RELATIONS if f" {how} " in true)
        if rng.random() < 0.5:
            return true, second + relation + first
        return true, first + relation + "a " + other_name(second.removeprefix("a "), rng)
    things = list(scene.things)
    place = int(rng.integers(len(things)))
    colour, shape = other_name(things[place].name, rng).split()
    if len(things) > 1 and rng.random() < 0.4:  # exchange two colours: only their binding is wrong
        partner = things[(place + 1) % len(things)]
        colour, shape = partner.colour, things[place].shape
        things[(place + 1) % len(things)] = world.Thing(partner.shape, things[place].colour, 0.5, 0.5, 0.1)
    things[place] = world.Thing(shape, colour, 0.5, 0.5, 0.1)
    return said[0], world.captions(world.Scene(tuple(things)))[0]


def other_name(name: str, rng: np.random.Generator) -> str:
    """Another class that has the colour or the shape of this one."""
    colour, shape = name.split()
    if rng.random() < 0.5:
        return f"{rng.choice([c for c in world.COLOURS if c != colour])} {shape}"
    return f"{colour} {rng.choice([s for s in world.SHAPES if s != shape])}"


def contrast(model: CLIPModel, tokenizer: Any, states: Tensor, views: list[View], rng: np.random.Generator) -> Tensor:
    """Symmetric contrastive loss; false captions are further negatives, equal captions are not.

    states: hidden_states[-2] of pictures that show whole scenes.
    """
    true, false = zip(*(describe(view.scene, rng) for view in views), strict=True)
    false = tuple(wrong if wrong not in true else "nothing" for wrong in false)
    last = model.vision_model.encoder.layers[-1](states, attention_mask=None)
    image = functional.normalize(model.visual_projection(model.vision_model.post_layernorm(last[:, 0])), dim=-1)
    tokens = tokenizer([*true, *false], padding=True, return_tensors="pt")
    text = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    text = functional.normalize(model.text_projection(text), dim=-1)
    logits = image @ text.T * model.logit_scale.clamp(max=4.0).exp()
    unique = {caption: number for number, caption in enumerate(dict.fromkeys(true))}
    meaning = torch.tensor([unique[caption] for caption in true])
    same = (meaning[:, None] == meaning) & ~torch.eye(len(views), dtype=torch.bool)
    logits = logits.masked_fill(functional.pad(same, (0, len(views))), -1e4)
    own = torch.arange(len(views))
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits[:, : len(views)].T, own)) / 2


def make_model() -> CLIPModel:
    tokenizer = make_tokenizer(end=True)
    small = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "hidden_act": "gelu"}
    vision = {**small, "num_hidden_layers": 5, "image_size": PIXELS, "patch_size": PATCH}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    text = {**small, **special, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 32}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=96))
    initialise(model)
    return model


def make_processor() -> CLIPProcessor:
    return CLIPProcessor(make_image_processor(), make_tokenizer(end=True))


def make_image_processor() -> CLIPImageProcessorPil:
    """PIL alone; a picture of another size is resized to 96 on its shorter side and cropped in the middle."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": PIXELS},
        crop_size={"height": PIXELS, "width": PIXELS},
        image_mean=[MEAN] * 3,
        image_std=[SPREAD] * 3,
    )


class _Temperature(nn.Module):
    """The parameter `logit_scale` of a model, as a module of its own."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.logit_scale = model.logit_scale


class Run(nn.Module):
    """The model with its throw-away heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(TOWER.seed)
        self.model = make_model()
        self.dense = Dense(128)
        self.tokenizer = make_tokenizer(end=True)

    def stages(self) -> list[Stage]:
        """First all layers but the last see; then these rest, and the last one and the text model learn captions."""
        vision: Any = self.model.vision_model
        tower = [vision.embeddings, vision.pre_layrnorm, *vision.encoder.layers[:-1]]
        joint = [vision.encoder.layers[-1], vision.post_layernorm, self.model.text_model]
        projections = [self.model.visual_projection, self.model.text_projection]
        return [
            Stage("tower", TOWER, self.tower_losses, [*tower, self.dense]),
            Stage("captions", CAPTIONS, self.caption_losses, [*joint, *projections, _Temperature(self.model)]),
        ]

    def save(self, folder: Path) -> None:
        save(self.model, make_processor(), folder)

    def tower_losses(self, step: int) -> dict[str, Tensor]:
        rng = world.train_rng(TOWER.seed, step)
        views = [sample_view(rng) for _ in range(TOWER_BATCH)]
        states, attention = see(self.model.vision_model, to_pixels([view.image for view in views]))
        losses: dict[str, Tensor] = self.dense(states, attention, views)
        return losses

    def caption_losses(self, step: int) -> dict[str, Tensor]:
        rng = world.train_rng(CAPTIONS.seed, step)
        views = [view for view in (sample_view(rng) for _ in range(CAPTIONS_BATCH * 10 // 9)) if view.whole]
        with torch.no_grad():
            states, _ = see(self.model.vision_model, to_pixels([view.image for view in views]))
        return {"contrast": contrast(self.model, self.tokenizer, states, views, rng)}
