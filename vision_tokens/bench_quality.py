"""How many questions a model still answers exactly when visual tokens are taken from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import mmaccel
from mmaccel.attachment import attached
from mmaccel.bench import Figure, Progress, Samples, mean, mean_difference, mean_ratio, silent
from mmaccel.methods import Unsupported
from mmaccel.pocket.world import Question, held_out
from vision_tokens.bench_settings import methods_named

Outcomes = dict[tuple[str, float], Samples]
"""By method and budget: for every question 1 if it was answered exactly, else 0."""

RIVALS = ("random", "hired")
"""What the others are compared with, over the same questions, if it is among them."""


@dataclass(frozen=True)
class Examination:
    """Held-out questions, and batches of them as a processor prepared them."""

    questions: list[Question]
    batches: Sequence[Mapping[str, Tensor]]
    processor: Any

    @classmethod
    def prepare(cls, processor: Any, count: int, batch: int, pixels: int, device: str = "cpu") -> Examination:
        """The first `count` held-out questions.  pixels: the size of the pictures."""
        pictures, questions = zip(*held_out(count, pixels), strict=True)
        batches = []
        for start in range(0, count, batch):
            prompts = [_prompt(processor, question.text) for question in questions[start : start + batch]]
            images = [Image.fromarray(picture) for picture in pictures[start : start + batch]]
            made = processor(images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt")
            batches.append({name: tensor.to(device) for name, tensor in made.items()})
        return cls(list(questions), batches, processor)

    @torch.inference_mode()
    def answers(self, model: Any) -> tuple[list[str], float]:
        """What the model answers, and the visual tokens that it keeps of a picture, on average."""
        said: list[str] = []
        kept = 0.0
        for batch in self.batches:
            tokens = model.generate(**batch, max_new_tokens=6, do_sample=False)
            answers = self.processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            said += [answer.strip() for answer in answers]
            dense = int((batch["input_ids"] == model.config.image_token_id).sum())
            kept += mmaccel.report(model)["visual_tokens"] if attached(model) else dense
        return said, kept / len(self.questions)

    def score(self, model: Any) -> tuple[Samples, float]:
        """For every question 1 if the model answers it exactly, else 0; and its visual tokens, as `answers` says."""
        said, kept = self.answers(model)
        right = [answer == question.answer for answer, question in zip(said, self.questions, strict=True)]
        return np.asarray(right, dtype=np.float64), kept


def _prompt(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return prompt


def measure_quality(
    model: Any,
    examination: Examination,
    methods: Sequence[str],
    budgets: Sequence[float],
    progress: Progress = silent,
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """Figures and rows of every method at every budget; figures are named `quantity.method.percent`.

    "dense" is the plain model, so it must not be decorated.  Methods are compared over the same questions: with dense,
    and with `RIVALS`.  methods: as `vision_tokens.bench_settings` reads them.  A budget that
    a method cannot reach on this model gets a row that says why, and no figures.
    """
    plan = {(name, budget): methods_named(name, budget) for name in methods for budget in budgets}
    outcomes: Outcomes = {}
    kept: dict[tuple[str, float], float] = {}
    refused: list[dict[str, Any]] = []
    dense, tokens = examination.score(model)
    for done, ((name, budget), chosen) in enumerate(plan.items()):
        progress(f"{name} at {budget:.0%}", done, len(plan))
        try:
            with mmaccel.applied(model, *chosen):
                outcomes[name, budget], kept[name, budget] = examination.score(model)
        except Unsupported as reason:
            refused.append({"part": "refused", "method": name, "budget": budget, "reason": str(reason)})
    progress("done", len(plan), len(plan))
    figures = {"accuracy.dense": mean(dense, "share"), "visual_tokens.dense": Figure(tokens, unit="tokens")}
    rows = [_row("dense", 1.0, tokens, dense, examination.questions)]
    for (name, budget), right in outcomes.items():
        key = f"{name}.{100 * budget:g}"
        figures[f"accuracy.{key}"] = mean(right, "share")
        figures[f"visual_tokens.{key}"] = Figure(kept[name, budget], unit="tokens")
        if dense.any():
            figures[f"accuracy_kept.{key}"] = mean_ratio(right, dense, "of dense")
        for rival in RIVALS:
            if name != rival and (rival, budget) in outcomes:
                figures[f"over_{rival}.{key}"] = mean_difference(right, outcomes[rival, budget], "share")
        rows.append(_row(name, budget, kept[name, budget], right, examination.questions))
    return figures, rows + refused


def _row(name: str, budget: float, kept: float, right: Samples, questions: Sequence[Question]) -> dict[str, Any]:
    kinds = np.asarray([question.kind for question in questions])
    accuracy = mean(right)
    return {
        "part": "quality",
        "method": name,
        "budget": budget,
        "visual_tokens": kept,
        "questions": len(questions),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "accuracy_by_kind": {str(kind): float(right[kinds == kind].mean()) for kind in sorted(set(kinds))},
    }
