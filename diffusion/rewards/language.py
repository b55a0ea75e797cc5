"""What a vision-language model says of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion.rewards.inputs import ImageReward, need_prompts
from diffusion.rewards.models import find_folder, shared
from diffusion.rewards.preprocessing import to_bytes
from mmaccel.checkpoints import load_part, load_weights


@dataclass(frozen=True, kw_only=True)
class VqaScore(ImageReward):
    """How sure a vision-language model is that a picture shows its prompt: the probability that it answers "yes".

    Range 0 to 1.  model: a folder of a transformers image-text-to-text checkpoint with its processor.  question: asked
    of every picture, with the prompt in place of {prompt}.  answer: one token; its spellings (capital or not, with or
    without a space before) are added up, because which of them is natural depends on the tokenizer.
    rows_per_call: pictures that the model reads at a time.
    Source: Lin et al. 2024, VQAScore (arXiv:2404.01291), eq. 1, with its question; the paper reads "Yes" alone.
    """

    name: ClassVar[str] = "vqa-score"

    model: str | Path
    question: str = 'Does this figure show "{prompt}"? Please answer yes or no.'
    answer: str = "yes"
    rows_per_call: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows_per_call < 1:
            raise ValueError(f"rows_per_call is a whole number from 1 up; got {self.rows_per_call!r}")

    def score(
        self, images: Float[Tensor, "rows 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        if "{prompt}" in self.question:
            asked = [self.question.replace("{prompt}", prompt) for prompt in need_prompts(self.name, prompts)]
        else:
            asked = [self.question] * len(images)
        reader = shared(_Reader, find_folder(self.name, str(self.model)), images.device)
        spellings = reader.spellings(self.answer)
        step = self.rows_per_call
        parts = [
            reader.first_token(images[start : start + step], asked[start : start + step])[:, spellings].sum(dim=-1)
            for start in range(0, len(images), step)
        ]
        return torch.cat(parts)


class _Reader:
    """A vision-language model and its processor, on one device, in float32."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.folder, self.device = folder, device
        self.processor: Any = load_part(AutoProcessor, folder)
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(
                f"{folder}: a question needs a processor with a chat template; got {type(self.processor).__name__}. "
                "Save the model's own there with processor.save_pretrained(folder)"
            )
        self.processor.tokenizer.padding_side = "left"  # generation continues the last column
        self.model: Any = load_weights(AutoModelForImageTextToText, folder).requires_grad_(False).to(device)

    def spellings(self, answer: str) -> list[int]:
        """The tokens that say the answer.  Raises ValueError if the vocabulary has none."""
        tokenizer = self.processor.tokenizer
        variants = {space + word for space in ("", " ") for word in (answer, answer.lower(), answer.capitalize())}
        encoded = [tokenizer(variant, add_special_tokens=False).input_ids for variant in sorted(variants)]
        single = {tokens[0] for tokens in encoded if len(tokens) == 1} - {tokenizer.unk_token_id}
        if not single:
            raise ValueError(
                f"vqa-score: the tokenizer of {self.folder} has no token for the answer {answer!r}; pass a question "
                'and an answer that the model knows: question="what shape is the red thing?", answer="square"'
            )
        return sorted(single)

    def first_token(self, images: Tensor, questions: Sequence[str]) -> Float[Tensor, "rows vocabulary"]:
        """The probability of every token as the first of the answer."""
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            for question in questions
        ]
        text = [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        pictures = [[picture] for picture in to_bytes(images)]
        inputs = self.processor(images=pictures, text=text, padding=True, return_tensors="pt").to(self.device)
        said = self.model.generate(
            **inputs, max_new_tokens=1, do_sample=False, num_beams=1, output_logits=True, return_dict_in_generate=True
        )
        logits: Tensor = said.logits[0]
        return logits.float().softmax(dim=-1)
