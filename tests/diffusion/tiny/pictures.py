"""Tiny pipelines that draw pictures."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests.diffusion.tiny.parts import (
    autoencoder,
    clip,
    ddim,
    flow,
    flow_shifted_by_size,
    language_model,
    t5,
    tokenizer,
    unet,
)

STABLE_DIFFUSION: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "image_encoder": None,
    "requires_safety_checker": False,
}


def stable_diffusion(kind: Any = None, **parts: Any) -> Any:
    return (kind or diffusers.StableDiffusionPipeline)(
        **{
            "vae": autoencoder(),
            "text_encoder": clip(),
            "tokenizer": tokenizer(),
            "unet": unet(),
            "scheduler": ddim(),
            **STABLE_DIFFUSION,
            **parts,
        }
    )


def stable_diffusion_xl(kind: Any = None, **parts: Any) -> Any:
    network = unet(
        32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
    )
    return (kind or diffusers.StableDiffusionXLPipeline)(
        **{
            "vae": autoencoder(sample_size=16),
            "text_encoder": clip(),
            "text_encoder_2": clip(projection=True),
            "tokenizer": tokenizer(),
            "tokenizer_2": tokenizer(),
            "unet": network,
            "scheduler": diffusers.EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
            "add_watermarker": False,
            **parts,
        }
    )


def stable_diffusion_3(kind: Any = None, **parts: Any) -> Any:
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return (kind or diffusers.StableDiffusion3Pipeline)(
        **{
            "transformer": network.eval(),
            "scheduler": flow(),
            "vae": autoencoder(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
            "text_encoder": clip(projection=True),
            "tokenizer": tokenizer(),
            "text_encoder_2": clip(projection=True),
            "tokenizer_2": tokenizer(),
            "text_encoder_3": None,
            "tokenizer_3": None,
            **parts,
        }
    )


def flux(**settings: Any) -> Any:
    network = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        **settings,
    )
    return diffusers.FluxPipeline(
        scheduler=flow_shifted_by_size(),
        vae=autoencoder(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        transformer=network.eval(),
    )


def qwen_image() -> Any:
    text = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
            "vocab_size": len(tokenizer()),
            "bos_token_id": 3,
            "eos_token_id": 4,
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        vocab_size=len(tokenizer()),
    )
    network = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.1, 0.9, 1.2, 1.0],
    )
    made = diffusers.QwenImagePipeline(
        scheduler=flow_shifted_by_size(),
        vae=vae.eval(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(text).eval(),
        tokenizer=tokenizer(),
        transformer=network.eval(),
    )
    made.prompt_template_encode, made.prompt_template_encode_start_idx = "{}", 0
    return made


def sana() -> Any:
    network = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=32,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.4,
    )
    return diffusers.SanaPipeline(
        tokenizer=tokenizer(),
        text_encoder=language_model("Gemma2"),
        vae=vae.eval(),
        transformer=network.eval(),
        scheduler=flow(),
    )


def pixart_sigma() -> Any:
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer(), text_encoder=t5(), vae=autoencoder(), transformer=network.eval(), scheduler=ddim()
    )


def dit() -> Any:
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
    )
    return diffusers.DiTPipeline(transformer=network.eval(), vae=autoencoder(), scheduler=ddim())
