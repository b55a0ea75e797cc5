"""Encoders of pictures, and of texts for CLIP: unit vectors from a checkpoint folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from diffusion.rewards.models import find_folder, model_type, shared
from diffusion.rewards.preprocessing import Preprocessing
from mmaccel.checkpoints import load_part, load_weights

ROWS = 64  # pictures an encoder sees at a time
REMEMBERED = 1024  # prompts whose embeddings are kept


class Encoder:
    """A checkpoint's image encoder, on one device, in float32; CLIP's text encoder, too."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.folder, self.device = folder, device
        self.preprocess = Preprocessing.of(load_part(AutoImageProcessor, folder))
        self.model: Any = load_weights(AutoModel, folder, unused=("pooler.",)).requires_grad_(False).to(device)
        self._texts: dict[str, Tensor] = {}
        self._tokenizer: Any = None

    def images(self, images: Float[Tensor, "rows 3 height width"]) -> Float[Tensor, "rows channels"]:
        """Unit vectors: CLIP's projected embedding; elsewhere (ViT, DINO) the class token after the last norm."""
        features = [self._features(self.preprocess(part)) for part in torch.split(images, ROWS)]
        return functional.normalize(torch.cat(features), dim=-1)

    def _features(self, pixels: Tensor) -> Tensor:
        if hasattr(self.model, "get_image_features"):
            features: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
            return features
        last: Tensor = self.model(pixel_values=pixels).last_hidden_state
        return last[:, 0] if last.ndim == 3 else last.mean(dim=(-2, -1))  # convolutional: the mean over places

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "rows channels"]:
        """Unit vectors of CLIP's text encoder, computed once a text.  Longer texts are cut at the encoder's length."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            if self._tokenizer is None:
                from transformers import AutoTokenizer

                self._tokenizer = load_part(AutoTokenizer, self.folder)
            length = self.model.config.text_config.max_position_embeddings
            tokens = self._tokenizer(new, padding=True, truncation=True, max_length=length, return_tensors="pt")
            features = self.model.get_text_features(**tokens.to(self.device)).pooler_output
            self._texts |= zip(new, functional.normalize(features, dim=-1), strict=True)
        embeddings = torch.stack([self._texts[text] for text in texts])
        for text in list(self._texts)[:-REMEMBERED]:
            self._texts.pop(text, None)
        return embeddings


def encoder(reward: str, model: str, device: torch.device) -> Encoder:
    """The image encoder of a checkpoint, loaded once."""
    return shared(Encoder, find_folder(reward, model), device)


def clip_encoder(reward: str, model: str, device: torch.device) -> Encoder:
    """The encoder of a CLIP checkpoint, loaded once.  Raises ValueError for another family."""
    folder = find_folder(reward, model)
    if (family := model_type(folder)) != "clip":
        raise ValueError(
            f"{reward} reads transformers checkpoints of the family 'clip'; {folder} is {family!r}. "
            "For SigLIP and other families use open-clip-score"
        )
    return shared(Encoder, folder, device)
