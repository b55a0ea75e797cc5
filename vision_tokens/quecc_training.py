"""pocket-quecc: QueCC's compressors for pocket-llava, which stays as it is; 16, 9 and 36 tokens for a picture's 144.

Recipe, seeds 71 to 73: steps of 12 pictures with up to four questions each.  Every question gets the picture's tokens
that are made for it, on the middle cells of their squares.  To the cross-entropy of the answer comes, fading out over
half of the steps, how far each token is from the feature that the encoder's class token attends to most in its square.
Squares of 3 x 3 cells are learnt first, in 2600 steps; those of 4 x 4 and then 2 x 2 go on from there, in 400 each.

Beside the paper's: neither the projector nor the language model is trained along, which know nothing but features of
the encoder.

Exact answers on 1000 held-out questions, in %, and from as many tokens that `HiRED` keeps:

| tokens     | colour | shape | count | place |  all |
| all 144    |    100 |   100 |  97.2 |  99.6 | 99.2 |
| 36 made    |    100 |   100 |  93.2 |  98.4 | 97.9 |
| 36 kept    |    100 |   100 |  94.4 |  99.2 | 98.4 |
| 16 made    |    100 |   100 |  93.2 |  97.6 | 97.7 |
| 16 kept    |    100 |   100 |  82.8 |  98.8 | 95.4 |
| 9 made     |    100 |  99.6 |  91.6 |  99.6 | 97.7 |
| 9 kept     |    100 |   100 |  80.8 |  98.8 | 94.9 |
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from mmaccel.pocket import world
from mmaccel.pocket.train.clip import GRID, cls_attention
from mmaccel.pocket.train.common import Recipe, Stage, make_tokenizer, to_pixels
from mmaccel.pocket.train.questions import answer_loss, choose, pack
from vision_tokens.language_input import evenly_spread
from vision_tokens.query_compressor import QueryCompressor

NEEDED = ("pocket-llava",)
RECIPES = {
    3: Recipe(seed=71, steps=2600, rate=1e-3, decay=0.5),
    4: Recipe(seed=72, steps=400, rate=5e-4, warmup=50, decay=0.6),
    2: Recipe(seed=73, steps=400, rate=5e-4, warmup=50, decay=0.6),
}
"""By kernel, in the order of training: each starts from the one before."""
LEVELS = (2, 3, 4)
TEMPLATE = (0, 2)  # the tokenizer drops the newline in front of the question; behind it are "ASSISTANT" and ":"
PICTURES, QUESTIONS = 12, 4


class Run(nn.Module):
    """The compressor, and the model that it is for."""

    def __init__(self, llava: Any) -> None:
        super().__init__()
        torch.manual_seed(RECIPES[3].seed)
        self.model = llava.requires_grad_(False)
        width, text = llava.config.vision_config.hidden_size, llava.config.text_config.hidden_size
        self.compressors = nn.ModuleDict(
            {f"kernel_{kernel}": QueryCompressor(width, width * len(LEVELS), text, kernel) for kernel in RECIPES}
        )
        self.tokenizer = make_tokenizer(end=False)
        self.cache: dict[str, list[int]] = {}

    def stages(self) -> Iterator[Stage]:
        """One a kernel; the next, once it is done, starts from its parameters, but for the convolution's."""
        trained: dict[str, Tensor] = {}
        for kernel, recipe in RECIPES.items():
            compressor = self.compressors[f"kernel_{kernel}"]
            compressor.load_state_dict(trained, strict=False)
            yield Stage(f"kernel_{kernel}", recipe, partial(self.losses_at, kernel), [compressor])
            trained = {name: value for name, value in compressor.state_dict().items() if "downsample" not in name}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        numbers = {"levels": LEVELS, "template": TEMPLATE}
        for kernel in RECIPES:
            file = folder / f"quecc-{(GRID // kernel) ** 2}.safetensors"
            state = self.compressors[f"kernel_{kernel}"].state_dict()
            named = {f"mm_projector.0.{name}": value.half() for name, value in state.items()}
            save_file(named, file, {name: " ".join(map(str, own)) for name, own in numbers.items()})
            file.chmod(0o644)

    def losses_at(self, kernel: int, step: int) -> dict[str, Tensor]:
        recipe = RECIPES[kernel]
        rng = world.train_rng(recipe.seed, step)
        scenes = [world.sample_scene(rng, (1, 5)) for _ in range(PICTURES)]
        asked = [(row, question) for row, scene in enumerate(scenes) for question in some(choose(scene, rng), rng)]
        rows, questions = torch.tensor([row for row, _ in asked]), [question for _, question in asked]
        core = self.model.model
        tower = getattr(core.vision_tower, "vision_model", core.vision_tower)
        with torch.no_grad():
            pixels = to_pixels([world.draw(scene)[0] for scene in scenes])
            states = tower(pixels, output_hidden_states=True).hidden_states
            features, levels = states[-2][:, 1:], torch.cat([states[level][:, 1:] for level in LEVELS], dim=-1)
            share = cls_attention(tower.encoder.layers[-2], states[-3])[:, 1:]
            best = best_of_squares(features, share, kernel)[rows]
            question = self.read([question.text for question in questions])
        made = self.compressors[f"kernel_{kernel}"](features[rows], levels[rows], question)
        fading = max(0.0, 1 - 2 * step / recipe.steps)
        return {
            "answer": self.answer(core.multi_modal_projector(made), kernel, questions),
            "feature": fading * functional.mse_loss(made, best) / best.var(),
        }

    def read(self, texts: list[str]) -> Float[Tensor, "rows width"]:
        """The language model's last hidden state at the end of each text, read alone."""
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt")
        states: Tensor = self.model.model.language_model(**inputs, use_cache=False).last_hidden_state
        return states[:, -1]

    def answer(self, visual: Float[Tensor, "rows kept width"], kernel: int, questions: list[world.Question]) -> Tensor:
        """Cross-entropy of the answers, one question a row; they stand where they would behind all tokens."""
        model = self.model.model.language_model
        before = model.get_input_embeddings()(torch.tensor(self.tokenizer.encode("USER:")))
        last = GRID**2 - 1
        seats = functional.pad(evenly_spread((GRID // kernel,) * 2, (GRID,) * 2), (0, 1), value=last)
        seats = seats.expand(len(visual), -1)
        real = torch.arange(seats.shape[1]).expand_as(seats) < seats.shape[1] - 1  # but for the last place
        packed = pack([[question] for question in questions], self.tokenizer, self.cache)
        return answer_loss(model, before, functional.pad(visual, (0, 0, 0, 1)), seats, packed, real)


def some(questions: list[world.Question], rng: np.random.Generator) -> list[world.Question]:
    """A few of the questions, whatever their kind."""
    return [questions[place] for place in rng.permutation(len(questions))[:QUESTIONS]]


def best_of_squares(
    features: Float[Tensor, "batch places width"], share: Float[Tensor, "batch places"], kernel: int
) -> Float[Tensor, "batch squares width"]:
    """Of each square, the feature of the place that gets the largest share of attention."""
    planes = rearrange(share, "b (h w) -> b 1 h w", h=GRID)
    _, places = functional.max_pool2d(planes, kernel, return_indices=True)
    return features.gather(1, repeat(places.flatten(1), "b squares -> b squares width", width=features.shape[-1]))


def figures(weights: Path, count: int = 1000) -> dict[str, dict[str, float]]:
    """Exact answers on held-out questions, from tokens that the compressors make and from as many that HiRED keeps."""
    import mmaccel
    from mmaccel import pocket
    from mmaccel.pocket.train.figures import answers, per_kind
    from vision_tokens import HiRED, QueCC
    from vision_tokens.loading import load

    model, processor = load(pocket.path("pocket-llava"))
    items = list(world.held_out(count))
    found = {"dense": per_kind(items, answers(model, processor, items))}
    for kernel in RECIPES:
        tokens = (GRID // kernel) ** 2
        file = str(weights / f"quecc-{tokens}.safetensors")
        for method in (QueCC(weights=file, budget=tokens), HiRED(budget=tokens)):
            with mmaccel.applied(model, method):
                found[f"{method.name} {tokens}"] = per_kind(items, answers(model, processor, items))
    return found
