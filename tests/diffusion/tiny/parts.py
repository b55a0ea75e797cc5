"""What the tiny pipelines are made of."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from torch import nn

from mmaccel.pocket.train.common import make_tokenizer

TOKENS = 12


def tokenizer() -> Any:
    """The pocket models' word-level tokenizer, which stands for every family's."""
    made = make_tokenizer(end=True)
    made.model_max_length = TOKENS
    return made


def clip(projection: bool = False, positions: int = TOKENS) -> nn.Module:
    """A CLIP text encoder."""
    words = tokenizer()
    config = transformers.CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=len(words),
        max_position_embeddings=positions,
        projection_dim=16,
        eos_token_id=words.eos_token_id,
        bos_token_id=words.bos_token_id,
        pad_token_id=words.pad_token_id,
        initializer_range=0.3,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


def t5(kind: str = "T5") -> nn.Module:
    """A T5 or UMT5 encoder."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer()), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def language_model(kind: str) -> nn.Module:
    """A decoder-only text encoder: Gemma2 or Llama."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return getattr(transformers, f"{kind}Model")(config).eval()


def autoencoder(channels: int = 4, **settings: Any) -> nn.Module:
    """A picture autoencoder that halves height and width."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        **settings,
    ).eval()


def unet(width: int = 16, **settings: Any) -> nn.Module:
    """Stable Diffusion's denoiser."""
    return diffusers.UNet2DConditionModel(
        **{
            "block_out_channels": (4, 8),
            "layers_per_block": 1,
            "sample_size": 8,
            "norm_num_groups": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": width,
            "attention_head_dim": 4,
            **settings,
        }
    ).eval()


def ddim(**settings: Any) -> Any:
    """DDIM as Stable Diffusion's checkpoints configure it."""
    return diffusers.DDIMScheduler(
        **{
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            **settings,
        }
    )


def flow(**settings: Any) -> Any:
    """Flow matching with shifted noise levels."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **settings})


def flow_shifted_by_size() -> Any:
    """Flow matching whose shift grows with the number of latent tokens, as Flux has it."""
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
