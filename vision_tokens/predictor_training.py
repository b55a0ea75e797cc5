"""pocket-dynamic-llava: Dynamic-LLaVA's two predictors, for pocket-llava, which stays as it is.

Recipe, seed 61: 800 steps of 8 pictures with up to eight questions each.  The predictors read the hidden states
before layer 2; hard decisions are drawn by Gumbel softmax (temperature 1 to 0.1), gradients pass straight through them
to the columns of the attention from that layer on (a token always sees itself).  To the answers' cross-entropy comes
100 (kept - target)^2 for each, targets 20 % of the visual tokens and half of the answers' words.

Beside the paper's: the language model is not trained along (pocket-llava has seen missing tokens, and needs no
mending), and the answers have one to three words, of which hardly any matters to a later one: **the output predictor
has little to learn here**, and stands in for one that read long answers.

Exact answers on 400 held-out questions, in %, from a share of the visual tokens behind layer 2:

| kept             | colour | shape | count | place |  all |
| all              |    100 |   100 |   100 |   100 |  100 |
| 20 %, predictor  |    100 |   100 |  97.0 |   100 | 99.2 |
| 20 %, as fastv   |    100 |   100 |  92.0 |   100 | 98.0 |
| 10 %, predictor  |    100 |   100 |  95.0 |  99.0 | 98.5 |
| 10 %, as fastv   |    100 |   100 |  89.0 |   100 | 97.2 |
| 5 %, predictor   |    100 |   100 |  93.0 |  96.0 | 97.2 |
| 5 %, as fastv    |    100 |   100 |  87.0 |   100 | 96.8 |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from mmaccel.pocket import world
from mmaccel.pocket.train.clip import see
from mmaccel.pocket.train.common import Recipe, Stage, make_tokenizer, to_pixels
from mmaccel.pocket.train.questions import Packed, answer_loss, choose, pack
from vision_tokens.predictors import ImagePredictor, OutputPredictor

NEEDED = ("pocket-llava",)
RECIPE = Recipe(seed=61, steps=800, rate=1e-3, warmup=50, decay=0.5)
BATCH = 8
LAYER = 2
WIDTH = 64  # of both predictors
TARGETS = {"image": 0.2, "output": 0.5}
WEIGHT = 100.0  # of the squared distance to the targets
BARELY = 1e-6  # of its attention is what a dropped token keeps, so that a gradient says what it would be worth


class Run(nn.Module):
    """The predictors, and the model that they are for."""

    def __init__(self, llava: Any) -> None:
        super().__init__()
        torch.manual_seed(RECIPE.seed)
        self.model = llava.requires_grad_(False)
        states = llava.config.text_config.hidden_size
        self.image_score_predictor = ImagePredictor(states, WIDTH)
        self.output_text_score_predictor = OutputPredictor(states, WIDTH)
        self.tokenizer = make_tokenizer(end=False)
        self.cache: dict[str, list[int]] = {}

    def stages(self) -> list[Stage]:
        return [
            Stage("predictors", RECIPE, self.losses_at, [self.image_score_predictor, self.output_text_score_predictor])
        ]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        kept = {name: value.half().contiguous() for name, value in self.state_dict().items() if "_predictor." in name}
        save_file(kept, folder / "dynamic-llava.safetensors")
        (folder / "dynamic-llava.safetensors").chmod(0o644)

    def losses_at(self, step: int) -> dict[str, Tensor]:
        rng = world.train_rng(RECIPE.seed, step)
        scenes = [world.sample_scene(rng, (1, 5)) for _ in range(BATCH)]
        packed = pack([choose(scene, rng) for scene in scenes], self.tokenizer, self.cache)
        core = self.model.model
        tower = getattr(core.vision_tower, "vision_model", core.vision_tower)
        with torch.no_grad():
            visual = core.multi_modal_projector(
                see(tower, to_pixels([world.draw(scene)[0] for scene in scenes]))[0][:, 1:]
            )
            before = core.language_model.get_input_embeddings()(torch.tensor(self.tokenizer.encode("USER:")))
        place = torch.arange(visual.shape[1]).expand(BATCH, -1)
        temperature = max(0.1, 1 - 0.9 * step / RECIPE.steps)
        with self.deciding(len(before), visual.shape[1], packed, temperature) as kept:
            loss = answer_loss(core.language_model, before, visual, place, packed)
        rates = {name: WEIGHT * (kept[name] - target) ** 2 for name, target in TARGETS.items()}
        return {"answer": loss, **rates}

    @contextmanager
    def deciding(self, start: int, visual: int, packed: Packed, temperature: float) -> Iterator[dict[str, Tensor]]:
        """From `LAYER` on, columns count as far as the predictors keep them; yields the shares that they keep."""
        said = answer_words(packed)
        kept: dict[str, Tensor] = {}
        column: list[Tensor] = []

        def decide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not column:
                hidden = args[0]
                images = decisions(self.image_score_predictor(hidden[:, start : start + visual]), temperature)
                words = decisions(self.output_text_score_predictor(hidden[:, start + visual :]), temperature)
                kept["image"], kept["output"] = images.mean(), words[said].mean()
                policy = torch.cat([torch.ones(BATCH, start), images, words.where(said, 1.0)], dim=1)
                itself = torch.eye(policy.shape[1], dtype=torch.bool)
                column.append((policy + BARELY).log()[:, None, None].masked_fill(itself, 0.0))
            return args, {**kwargs, "attention_mask": kwargs["attention_mask"] + column[0]}

        layers = self.model.model.language_model.layers[LAYER:]
        handles = [layer.register_forward_pre_hook(decide, with_kwargs=True) for layer in layers]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()


def decisions(logits: Float[Tensor, "batch tokens 2"], temperature: float) -> Float[Tensor, "batch tokens"]:
    """1 where a token stays, else 0, drawn; with the gradients of the soft decisions."""
    return functional.gumbel_softmax(logits.log_softmax(-1), tau=temperature, hard=True)[..., 0]


def answer_words(packed: Packed) -> Bool[Tensor, "rows length"]:
    """The places of the answers' words: behind a place where one is to be said, in the same question."""
    said = packed.target >= 0
    same = packed.segment[:, 1:] == packed.segment[:, :-1]
    return functional.pad(said[:, :-1] & said[:, 1:] & same, (1, 0))


def figures(weights: Path, count: int = 1000) -> dict[str, dict[str, float]]:
    """Exact answers on held-out questions, with the predictors' cut and with FastV's at the same place."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import mmaccel
    from mmaccel import pocket
    from mmaccel.pocket.train.figures import answers, per_kind
    from vision_tokens import DynamicLLaVA, FastV

    model: Any = AutoModelForImageTextToText.from_pretrained(pocket.path("pocket-llava")).eval()
    processor: Any = AutoProcessor.from_pretrained(pocket.path("pocket-llava"))
    items = list(world.held_out(count))
    file, found = (
        str(weights / "dynamic-llava.safetensors"),
        {"dense": per_kind(items, answers(model, processor, items))},
    )
    for share in (0.2, 0.1, 0.05):
        ways = {"predictor": DynamicLLaVA(weights=file, kept_share=share), "fastv": FastV(kept_share=share)}
        for name, method in ways.items():
            with mmaccel.applied(model, method):
                found[f"{name} {share:.0%}"] = per_kind(items, answers(model, processor, items))
    return found
