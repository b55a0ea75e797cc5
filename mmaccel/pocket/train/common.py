"""What the pocket models' training scripts share: the tokenizer, the image processor's numbers, one training loop."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mmaccel.pocket.world import COLOURS, NUMBERS, REGIONS, RELATIONS, SHAPES, Image

PIXELS = 96
PATCH = 8
MEAN, SPREAD = 0.2, 0.25  # of channel values in [0, 1]; the background is dark
PAD, UNKNOWN, IMAGE, BEGIN, END = "<pad>", "<unk>", "<image>", "<bos>", "<eos>"

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<eos>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_tokenizer(end: bool, more: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """The word-level tokenizer of all pocket models: lower case, punctuation apart, unknown words are <unk>.

    end: close every text with <eos>, as CLIP's text encoder needs; a language model's prompt stays open.
    more: further words, whose tokens follow the others.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    plurals = [shape + ("es" if shape == "cross" else "s") for shape in SHAPES]
    phrases = (
        "what colour is the thing things ? shape how many are there where red user : assistant a an , . nothing "
        "and of in picture image there"
    )
    words = [*SHAPES, *plurals, *COLOURS, *NUMBERS, *phrases.split(), "five", "six", "seven", "eight", "nine"]
    words += [word for phrase in (*REGIONS, *RELATIONS) for word in phrase.split()]
    specials = [PAD, UNKNOWN, IMAGE, BEGIN, END]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*specials, *words, *more]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\bcolor\b"), "colour")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}" if end else f"{BEGIN} $A",
        special_tokens=[(BEGIN, vocabulary[BEGIN]), (END, vocabulary[END])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="right" if end else "left",
        model_max_length=32 if end else 2048,
    )


def initialise(module: nn.Module, spread: float = 0.06) -> None:
    """Normal weights of this standard deviation (wider than usual, as the models are narrow), biases zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(part.weight, std=spread)
            if getattr(part, "bias", None) is not None:
                nn.init.zeros_(part.bias)  # type: ignore[arg-type]  # not None, as just asked


def to_pixels(images: list[Image]) -> Tensor:
    """What the processors make of pictures that have the right size already: [images, 3, height, width]."""
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return (batch.float() / 255 - MEAN) / SPREAD


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run: AdamW with betas .9 and .98; linear warm-up, plateau, linear decay to zero in the last part."""

    seed: int
    steps: int
    rate: float = 2e-3
    warmup: int = 150
    weight_decay: float = 0.02
    decay: float = 0.4  # of the steps

    def rate_at(self, step: int) -> float:
        return self.rate * min((step + 1) / self.warmup, (self.steps - step) / (self.decay * self.steps), 1.0)


@dataclass(frozen=True)
class Stage:
    """A part of a training run: what it minimises at each step, and the parts of the model that it changes."""

    name: str
    recipe: Recipe
    losses_at: Callable[[int], dict[str, Tensor]]
    trained: Sequence[nn.Module]


def fit(run: nn.Module, stage: Stage, out_dir: Path, resume: bool = True) -> None:
    """Minimise the sum of the stage's losses.

    Every 100 steps it appends the mean losses to `out_dir/log.jsonl` and saves a checkpoint, from which `resume` goes
    on.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "pid").write_text(str(os.getpid()))
    recipe = stage.recipe
    parameters = [p for part in stage.trained for p in part.parameters() if p.requires_grad]
    decayed, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)
    checkpoint, first = out_dir / "checkpoint.pt", 0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        run.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = int(state["step"])
    seen: dict[str, list[float]] = {}  # since the last line of the log
    began = time.monotonic()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        losses = stage.losses_at(step)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values(), torch.zeros(())).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for key, value in losses.items():
            seen.setdefault(key, []).append(value.item())
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            seconds = (time.monotonic() - began) / (step + 1 - first)
            line = {"step": step + 1, "of": recipe.steps, "seconds_a_step": round(seconds, 3)}
            text = json.dumps(
                {
                    "stage": stage.name,
                    **line,
                    **{key: round(sum(values) / len(values), 4) for key, values in seen.items()},
                }
            )
            with (out_dir / "log.jsonl").open("a") as log:
                log.write(text + "\n")
            print(text, flush=True)
            seen = {}
            state = {"model": run.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write a checkpoint: float16 weights, which the configuration asks to be loaded in float32."""
    if model.can_generate():
        model.generation_config.max_new_tokens = 8
    model.half().save_pretrained(folder)
    model.float()
    processor.save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    (folder / "model.safetensors").chmod(0o644)
