"""pocket-llava-next: a `LlavaNextForConditionalGeneration` that reads larger pictures in tiles of 96 px.

Recipe, seed 3: pocket-llava's projector and language model, 1000 steps of 12 pictures of one size with up to eight
questions each, the tower frozen; sizes as `picture_size` says, one to six things. Three steps in four keep only a
random 5 to 60 % of the visual tokens, but at least one of every thing. Two processes shared each batch and averaged
gradients.

`mmaccel.pocket.train.figures.of("pocket-llava-next", mmaccel.pocket.path("pocket-llava-next"))` measures the figures.

Exact answers on held-out questions (1000 for 192 x 192, 400 for each other size), in %:

| height x width | colour | shape | count | place |  all |
| 192 x 192      |    100 |   100 |  92.0 |  98.4 | 97.6 |
| 96 x 192       |    100 |   100 |  92.0 |  99.0 | 97.8 |
| 192 x 96       |    100 |   100 |  84.0 |  99.0 | 95.8 |
| 180 x 130      |    100 |   100 |  89.0 |  98.0 | 96.8 |

Of 192 x 192, from some tokens (400 questions), ranked by each tile's CLS attention, tiles side by side:

| 20 % by CLS    |    100 |   100 |  73.0 |  92.0 | 91.2 |
| 20 % random    |   94.0 |  83.0 |  62.0 |  58.0 | 74.2 |
| 10 % by CLS    |    100 |   100 |  73.0 |  91.0 | 91.0 |
| 10 % random    |   64.0 |  67.0 |  51.0 |  38.0 | 55.0 |
| 5 % by CLS     |    100 |   100 |  76.0 |  90.0 | 91.5 |
| 5 % random     |   52.0 |  56.0 |  34.0 |  23.0 | 41.2 |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from torch import Tensor, nn
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from mmaccel.pocket import world
from mmaccel.pocket.train.clip import owners, see
from mmaccel.pocket.train.common import (
    CHAT_TEMPLATE,
    MEAN,
    PATCH,
    PIXELS,
    SPREAD,
    Recipe,
    Stage,
    make_tokenizer,
    save,
)
from mmaccel.pocket.train.llava import adopt_tower, language_config
from mmaccel.pocket.train.questions import answer_loss, choose, pack, some_places

BATCH = 12
RECIPE = Recipe(seed=3, steps=1000, rate=1e-3, warmup=100)
PINPOINTS = [[96, 192], [192, 96], [192, 192]]  # (height, width) of the tilings


def picture_size(rng: np.random.Generator) -> tuple[int, int]:
    """(height, width): 192 x 192 (40 %), two tiles (15 % either way), or anything from 100 to 224 (30 %)."""
    chance = rng.random()
    if chance < 0.4:
        return 192, 192
    if chance < 0.7:
        return (96, 192) if chance < 0.55 else (192, 96)
    height = int(rng.integers(100, 225))
    return height, int(rng.integers(max(100, height // 2), min(224, 2 * height) + 1))


def make_model(clip: Any, llava: Any) -> LlavaNextForConditionalGeneration:
    """Pocket-llava's tower, projector and language model, with a newline of zeros."""
    config = LlavaNextConfig(
        vision_config=clip.config.vision_config.to_dict(),
        text_config=language_config(),
        image_token_index=llava.config.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaNextForConditionalGeneration(config)
    model.model.multi_modal_projector.load_state_dict(llava.model.multi_modal_projector.state_dict())
    model.model.language_model.load_state_dict(llava.model.language_model.state_dict())
    nn.init.zeros_(model.model.image_newline)
    model.tie_weights()
    adopt_tower(model, clip)
    return model


def make_processor() -> LlavaNextProcessor:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": PIXELS},
        crop_size={"height": PIXELS, "width": PIXELS},
        image_grid_pinpoints=PINPOINTS,
        image_mean=[MEAN] * 3,
        image_std=[SPREAD] * 3,
    )
    return LlavaNextProcessor(
        images,
        make_tokenizer(end=False),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


class Run(nn.Module):
    """The model, and what it needs beside it while it learns."""

    def __init__(self, clip: Any, llava: Any) -> None:
        super().__init__()
        torch.manual_seed(RECIPE.seed)
        self.model = make_model(clip, llava)
        self.clip = clip.requires_grad_(False)
        self.processor = make_processor()
        self.cache: dict[str, list[int]] = {}

    def stages(self) -> list[Stage]:
        return [Stage("answers", RECIPE, self.losses_at, [self.model])]

    def save(self, folder: Path) -> None:
        save(self.model, make_processor(), folder)

    def losses_at(self, step: int) -> dict[str, Tensor]:
        """Pictures of one size, so that they have equally many visual tokens."""
        rng = world.train_rng(RECIPE.seed, step)
        height, width = picture_size(rng)
        smallest, largest = world.sizes_at(height, width)
        if rng.random() < 0.3:  # as a close-up shows them
            largest *= rng.uniform(1, 1.8)
        scenes = [world.sample_scene(rng, (1, 6), (smallest, largest), width / height) for _ in range(BATCH)]
        tokenizer: Any = self.processor.tokenizer
        packed = pack([choose(scene, rng) for scene in scenes], tokenizer, self.cache)
        drawn = [world.draw(scene, (height, width)) for scene in scenes]
        inputs = self.processor.image_processor([image for image, _ in drawn], return_tensors="pt")
        core = self.model.model
        with torch.no_grad():
            features = see(self.clip.vision_model, inputs.pixel_values.flatten(0, 1))[0][:, 1:]
        features = core.multi_modal_projector(features).unflatten(0, (BATCH, -1))
        visual = torch.stack(
            core.pack_image_features(list(features), inputs.image_sizes, "default", core.image_newline)[0]
        )
        place = torch.arange(visual.shape[1]).expand(BATCH, -1)
        if step % 4:
            place = some_places(self.owner_of_tokens([shown for _, shown in drawn]), rng)
            visual = visual.take_along_dim(place[:, :, None], dim=1)
        before = core.language_model.get_input_embeddings()(torch.tensor(tokenizer.encode("USER:")))
        return {"answer": answer_loss(core.language_model, before, visual, place, packed)}

    def owner_of_tokens(self, shown: list[world.Image]) -> np.ndarray:
        """Which thing each visual token shows, [pictures, tokens]: the pictures' own way through tiling and packing."""
        tiles = self.processor.image_processor(
            [np.repeat(numbers[:, :, None], 3, axis=2) for numbers in shown],
            resample=Resampling.NEAREST,
            do_rescale=False,
            do_normalize=False,
            return_tensors="np",
        )
        owner = [
            torch.tensor(np.stack([owners(tile[0]) for tile in picture]))[..., None] for picture in tiles.pixel_values
        ]
        none = torch.zeros(1, dtype=torch.long)
        packed = self.model.model.pack_image_features(owner, torch.tensor(tiles.image_sizes), "default", none)[0]
        return torch.stack(packed)[..., 0].numpy()
