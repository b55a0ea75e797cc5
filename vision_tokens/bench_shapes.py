"""The shapes on which speed is measured: real transformers classes with random weights.

Speed depends on shapes alone, so nothing has to be downloaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TEXT_TOKENS = 32  # of the prompt, beside the visual ones


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A LLaVA or, with tiles, a LLaVA-NeXT: a CLIP tower and a Llama.

    tiles: along each side of the picture, beside the whole picture; 0 for LLaVA, which has no tiles.
    """

    summary: str
    vision_width: int = 256
    vision_layers: int = 6
    width: int = 768
    layers: int = 16
    feed_forward: int = 2048
    head_width: int = 64
    vocabulary: int = 32_064
    pixels: int = 336
    patch: int = 14
    tiles: int = 0
    dtype: torch.dtype = torch.float32

    def build(self, device: str = "cpu", seed: int = 0) -> Any:
        """The model, with random weights and no end-of-text token, so that it generates as long as it is asked to."""
        from transformers import LlamaConfig

        text = LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // self.head_width,
            num_key_value_heads=self.width // self.head_width,
            vocab_size=self.vocabulary,
            max_position_embeddings=8192,
            eos_token_id=None,
            pad_token_id=0,
        )
        architecture, config = self.architecture(text)
        torch.manual_seed(seed)
        with torch.device(device):
            model = architecture._from_config(config, dtype=self.dtype)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        return model.eval().requires_grad_(False)

    @property
    def tower(self) -> dict[str, int]:
        """The vision encoder's sizes."""
        return {
            "hidden_size": self.vision_width,
            "intermediate_size": 4 * self.vision_width,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.vision_width // 64,
            "image_size": self.pixels,
            "patch_size": self.patch,
        }

    def architecture(self, text: Any) -> tuple[Any, Any]:
        """The class of the model, and its configuration around that of the language model."""
        from transformers import (
            CLIPVisionConfig,
            LlavaConfig,
            LlavaForConditionalGeneration,
            LlavaNextConfig,
            LlavaNextForConditionalGeneration,
        )

        vision = CLIPVisionConfig(**self.tower, projection_dim=self.vision_width)
        common = {"image_token_index": self.vocabulary - 1, "vision_config": vision, "text_config": text}
        if not self.tiles:
            return LlavaForConditionalGeneration, LlavaConfig(**common)
        side = self.tiles * self.pixels
        return LlavaNextForConditionalGeneration, LlavaNextConfig(**common, image_grid_pinpoints=[[side, side]])

    @property
    def visual_tokens(self) -> int:
        """In the prompt: those of every picture and, with tiles, a newline token for each row of the tiled plane."""
        side = self.pixels // self.patch
        return side**2 * (1 + self.tiles**2) + side * self.tiles

    def inputs(self, device: str = "cpu", seed: int = 0, rows: int = 1) -> dict[str, Tensor]:
        """A prompt of a random picture or video and `TEXT_TOKENS` random words, for `generate`; alike in all rows."""
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(1, self.vocabulary - 2, (1, TEXT_TOKENS), generator=generator)
        visual = torch.full((1, self.visual_tokens), self.vocabulary - 1)
        tokens = torch.cat([text[:, : TEXT_TOKENS // 2], visual, text[:, TEXT_TOKENS // 2 :]], dim=1)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **self.seen(generator)}
        return {name: tensor.repeat_interleave(rows, dim=0).to(device) for name, tensor in inputs.items()}

    def seen(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The random picture."""
        picture = (3, self.pixels, self.pixels)
        if not self.tiles:
            return {"pixel_values": torch.randn(1, *picture, generator=generator).to(self.dtype)}
        tiled = torch.randn(1, 1 + self.tiles**2, *picture, generator=generator).to(self.dtype)
        return {"pixel_values": tiled, "image_sizes": torch.full((1, 2), self.tiles * self.pixels)}


@dataclass(frozen=True, kw_only=True)
class VideoShape(Shape):
    """A LLaVA-OneVision that watches a video: a SigLIP tower, every frame pooled to half its side, and a Llama."""

    frames: int = 32
    pixels: int = 384

    @property
    def visual_tokens(self) -> int:
        return self.frames * math.ceil(self.pixels // self.patch / 2) ** 2 + 1  # and a newline behind the last

    def architecture(self, text: Any) -> tuple[Any, Any]:
        from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, SiglipVisionConfig

        vision = SiglipVisionConfig(**self.tower, vision_use_head=False)
        words = {"image_token_index": self.vocabulary - 2, "video_token_index": self.vocabulary - 1}
        config = LlavaOnevisionConfig(**words, vision_config=vision, text_config=text)
        return LlavaOnevisionForConditionalGeneration, config

    def seen(self, generator: torch.Generator) -> dict[str, Tensor]:
        video = torch.randn(1, self.frames, 3, self.pixels, self.pixels, generator=generator)
        return {"pixel_values_videos": video.to(self.dtype)}


_SEVEN_BILLION: dict[str, Any] = {
    "vision_width": 1024,
    "vision_layers": 24,
    "width": 4096,
    "layers": 32,
    "feed_forward": 11_008,
    "head_width": 128,
    "dtype": torch.bfloat16,
}

SHAPES = {
    "A": Shape(summary="LLaVA, 168 M parameters, 576 visual tokens, float32"),
    "B": Shape(summary="LLaVA-NeXT, 168 M parameters, 2,880 visual tokens and 48 newlines, float32", tiles=2),
    "V": VideoShape(summary="LLaVA-OneVision, 253 M parameters, 32 frames, 6,272 visual tokens, float32", layers=28),
    "A7": Shape(summary="LLaVA, 7 B parameters, 576 visual tokens, bfloat16", **_SEVEN_BILLION),
    "B7": Shape(summary="LLaVA-NeXT, 7 B, 2,880 visual tokens and 48 newlines, bfloat16", tiles=2, **_SEVEN_BILLION),
}
"""By the name that figures carry; the largest are meant for a GPU."""
