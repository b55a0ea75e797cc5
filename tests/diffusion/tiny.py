"""Tiny random pipelines of the real classes, and calls for them: no download, some milliseconds a forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from mmaccel.pocket.train.common import make_tokenizer

TOKENS = 12
PROMPTS = ("four red squares", "a blue circle")


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


PICTURE = {"height": 16, "width": 16}
VIDEO = {"height": 8, "width": 8, "num_frames": 3}

CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "stable-diffusion": (stable_diffusion, PICTURE),
    "stable-diffusion-xl": (stable_diffusion_xl, PICTURE),
    "stable-diffusion-3": (stable_diffusion_3, {**PICTURE, "max_sequence_length": TOKENS}),
    "flux": (lambda: flux(guidance_embeds=True), {**PICTURE, "max_sequence_length": TOKENS}),
    "flux-true-cfg": (
        flux,
        {**PICTURE, "negative_prompt": "a star", "true_cfg_scale": 3.0, "max_sequence_length": TOKENS},
    ),
    "qwen-image": (qwen_image, {**PICTURE, "negative_prompt": "a star", "true_cfg_scale": 3.0}),
    "sana": (
        sana,
        {
            "height": 32,
            "width": 32,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
            "max_sequence_length": TOKENS,
        },
    ),
    "pixart-sigma": (
        pixart_sigma,
        {**PICTURE, "use_resolution_binning": False, "clean_caption": False, "max_sequence_length": TOKENS},
    ),
    "dit": (dit, {}),
    "wan-2.1": (wan, {**PICTURE, "num_frames": 3, "max_sequence_length": TOKENS}),
    "wan-2.2": (
        wan_22,
        {**PICTURE, "num_frames": 3, "guidance_scale_2": 3.0, "max_sequence_length": TOKENS},
    ),
    "ltx": (ltx, {**VIDEO, "height": 32, "width": 32, "guidance_rescale": 0.3, "max_sequence_length": TOKENS}),
    "cogvideox": (cogvideox, {**VIDEO, "num_frames": 5, "max_sequence_length": TOKENS}),
    "hunyuan-video": (
        hunyuan_video,
        {
            **PICTURE,
            "num_frames": 5,
            "prompt_template": {"template": "{}", "crop_start": 0},
            "max_sequence_length": TOKENS,
        },
    ),
    "animatediff": (animatediff, {**PICTURE, "num_frames": 2}),
}
"""Every pipeline of the matrix: how it is made, and what its calls need beside the prompt."""


@cache
def pipeline(case: str) -> Any:
    """The pipeline of a case, made once: every test gives it back as it was."""
    return fresh(CASES[case][0])


def fresh(make: Callable[[], Any]) -> Any:
    """A pipeline with seeded random weights, wide enough that prompts, times and noises matter."""
    torch.manual_seed(0)
    made = make()
    for name in ("unet", "transformer", "transformer_2"):
        network = getattr(made, name, None)
        if network is not None:
            for parameter in network.parameters():
                if parameter.ndim > 1 or not parameter.any():
                    nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.1)
    made.set_progress_bar_config(disable=True)
    return made


def call(case: str, prompts: int = 1, **more: Any) -> dict[str, Any]:
    """The arguments of a typical call: three steps, pictures as tensors in [0, 1]."""
    words: dict[str, Any] = {"prompt": PROMPTS[0] if prompts == 1 else [*PROMPTS, *PROMPTS][:prompts]}
    if case == "dit":
        words = {"class_labels": [3, 7, 11][:prompts]}
    elif prompts > 1 and "negative_prompt" in CASES[case][1]:
        words["negative_prompt"] = [CASES[case][1]["negative_prompt"]] * prompts
    return {**CASES[case][1], **words, "num_inference_steps": 3, "output_type": "pt", **more}


def seeded(*seeds: int) -> Any:
    """Generators, fresh; one alone is no list."""
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made if len(made) > 1 else made[0]


def brightness(images: Tensor, prompts: Any, **context: Any) -> Tensor:
    """A reward of pictures and videos: their mean."""
    return images.flatten(1).mean(dim=1)
