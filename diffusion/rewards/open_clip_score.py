"""CLIP score with the models of the open_clip library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from diffusion.rewards.encoders import ROWS
from diffusion.rewards.inputs import ImageReward, need_prompts
from diffusion.rewards.models import shared
from diffusion.rewards.preprocessing import Preprocessing
from mmaccel.checkpoints import first_line


@dataclass(frozen=True, kw_only=True)
class OpenClipScore(ImageReward):
    """How well a picture fits its prompt: the cosine similarity of their embeddings by an open_clip model.

    Range -1 to 1.  model: open_clip's name, e.g. "ViT-B-32".  pretrained: its tag, e.g. "laion2b_s34b_b79k", which
    open_clip downloads if it has not, or a .safetensors file.  Needs the extra `clip`.
    Source: as `ClipScore`; Ilharco et al. 2021, OpenCLIP.
    """

    name: ClassVar[str] = "open-clip-score"

    model: str
    pretrained: str | Path

    def score(
        self, images: Float[Tensor, "rows 3 height width"], prompts: Sequence[str | None]
    ) -> Float[Tensor, " rows"]:
        texts = need_prompts(self.name, prompts)
        clip = shared(_OpenClip, self.model, str(self.pretrained), images.device)
        return (clip.images(images) * clip.texts(texts)).sum(dim=-1)


class _OpenClip:
    """A model of open_clip with its preprocessing and tokenizer, on one device, in float32."""

    def __init__(self, model: str, pretrained: str, device: torch.device) -> None:
        open_clip = _open_clip()
        tags = open_clip.list_pretrained_tags_by_model(model)
        weights = Path(pretrained)
        if model not in open_clip.list_models():
            raise ValueError(f"open-clip-score: open_clip has no model {model!r}; open_clip.list_models() lists them")
        if pretrained not in tags and not (weights.is_file() and weights.suffix == ".safetensors"):
            raise ValueError(
                f"open-clip-score: {pretrained!r} is neither a .safetensors file nor a tag of {model}; its tags: "
                f"{', '.join(tags) or 'none'}"
            )
        self.model: Any = open_clip.create_model(model, pretrained=pretrained, precision="fp32", device=device).eval()
        self.device, self.tokenize = device, open_clip.get_tokenizer(model)
        settings = open_clip.get_model_preprocess_cfg(self.model)
        size = settings["size"]
        height, width = (size, size) if isinstance(size, int) else size
        resize_mode, interpolation = settings.get("resize_mode", "shortest"), settings.get("interpolation", "bicubic")
        if resize_mode == "longest" or (resize_mode == "shortest" and height != width):
            raise ValueError(
                f"open-clip-score: {model} resizes pictures by {resize_mode!r} to {height} x {width}, which is not "
                "supported; supported: 'squash', and 'shortest' to a square"
            )
        squashes = resize_mode == "squash"
        self.preprocess = Preprocessing(
            (height, width) if squashes else height,
            None if squashes else (height, width),
            "bicubic" if interpolation == "random" else interpolation,
            tuple(settings["mean"]),
            tuple(settings["std"]),
        )
        self._texts: dict[str, Tensor] = {}

    def images(self, images: Tensor) -> Float[Tensor, "rows channels"]:
        parts = [self.model.encode_image(self.preprocess(part)) for part in torch.split(images, ROWS)]
        return functional.normalize(torch.cat(parts), dim=-1)

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "rows channels"]:
        return functional.normalize(self.model.encode_text(self.tokenize(list(texts)).to(self.device)), dim=-1)


def _open_clip() -> Any:
    try:
        return import_module("open_clip")  # which imports torchvision
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"open-clip-score needs open_clip, which cannot be imported ({first_line(error)}). Install it: pip install "
            '"mmaccel[clip]"; if the message is about torchvision, install the torchvision of the same release and '
            "build (CPU or CUDA) as your torch. clip-score needs neither"
        ) from error
