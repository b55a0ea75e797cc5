"""Tiny pipelines that draw videos."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from tests.diffusion.tiny.parts import (
    TOKENS,
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


def _wan_network() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    ).eval()


def wan(**parts: Any) -> Any:
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.1, 0.9, 1.2, 1.0],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    return diffusers.WanPipeline(
        **{
            "tokenizer": tokenizer(),
            "text_encoder": t5("UMT5"),
            "vae": vae.eval(),
            "scheduler": flow(),
            "transformer": _wan_network(),
            **parts,
        }
    )


def wan_22() -> Any:
    """Wan 2.2: one network down to noise level 0.7, another below it."""
    return wan(transformer_2=_wan_network(), boundary_ratio=0.7)


def ltx(**settings: Any) -> Any:
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 4),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(4, 4),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=1,
        encoder_causal=True,
        **settings,
    )
    made = diffusers.LTXPipeline(
        scheduler=flow_shifted_by_size(),
        vae=vae.eval(),
        text_encoder=t5(),
        tokenizer=tokenizer(),
        transformer=network.eval(),
    )
    made.tokenizer_max_length = TOKENS
    return made


def cogvideox(**parts: Any) -> Any:
    network = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=16,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        patch_size=2,
        max_text_seq_length=TOKENS,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
    )
    return diffusers.CogVideoXPipeline(
        **{
            "tokenizer": tokenizer(),
            "text_encoder": t5(),
            "vae": vae.eval(),
            "transformer": network.eval(),
            "scheduler": diffusers.CogVideoXDDIMScheduler(
                prediction_type="v_prediction",
                timestep_spacing="trailing",
                rescale_betas_zero_snr=True,
                snr_shift_scale=1.0,
            ),
            **parts,
        }
    )


def hunyuan_video() -> Any:
    network = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 2, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 2,
        up_block_types=("HunyuanVideoUpBlock3D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        spatial_compression_ratio=2,
        temporal_compression_ratio=4,
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=language_model("Llama"),
        tokenizer=tokenizer(),
        transformer=network.eval(),
        vae=vae.eval(),
        scheduler=flow(shift=7.0),
        text_encoder_2=clip(positions=77),
        tokenizer_2=tokenizer(),
    )


def animatediff() -> Any:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(4, 8),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        use_motion_mid_block=False,
    )
    return diffusers.AnimateDiffPipeline(
        vae=autoencoder(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=unet(),
        motion_adapter=adapter.eval(),
        scheduler=ddim(beta_schedule="linear"),
    )
