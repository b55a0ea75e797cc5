"""What shapes a masked, or causal, autoregressive image model."""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from diffusion.autoregressive.noise_schedule import Kind, Prediction

Attention = Literal["masked", "causal", "shared"]
Head = Literal["diffusion", "mixture"]
Variance = Literal["learned", "fixed-large", "fixed-small"]
_CHOICES = {
    "attention": Attention,
    "head": Head,
    "prediction": Prediction,
    "variance": Variance,
    "noise_schedule": Kind,
}


class MARConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped here
    """The settings of a `MARModel`; the defaults are MAR-L of arXiv:2406.11838, for ImageNet at 256 px.

    attention: "masked" sees the tokens drawn so far, wherever they lie, and computes everything anew for each set of
    them; "causal" draws in raster order, with a cache; "shared" is a head alone, a draft over its target's backbone.
    grid: tokens on a side.  patch_size: latent pixels on a side of a token.  channels: of the latents.
    latent_scale: the model's latents are the autoencoder's times this.
    buffer_tokens: copies of the class embedding that stand before the picture (masked models).
    decoder_layers: of masked models; causal ones have one stack, of `encoder_layers`.
    head: "diffusion" draws a token in `diffusion_steps` steps of a small network, "mixture" from a Gaussian mixture.
    prediction, variance, noise_schedule: of the diffusion head, see `diffusion.autoregressive.heads`.
    noisy_end: whether the last diffusion step draws noise.  Published samplers leave it out, and then a trajectory has
    no density, which exact speculation needs.
    """

    model_type = "mar"
    __no_type_check__ = True  # for the tests' shape checks: its __init__ takes more than its signature says

    attention: Attention = "masked"
    grid: int = 16
    patch_size: int = 1
    channels: int = 16
    latent_scale: float = 0.2325
    classes: int = 1000
    hidden_size: int = 1024
    encoder_layers: int = 16
    decoder_layers: int = 16
    attention_heads: int = 16
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6
    buffer_tokens: int = 64
    head: Head = "diffusion"
    head_width: int = 1280
    head_layers: int = 8
    mixtures: int = 16
    prediction: Prediction = "epsilon"
    variance: Variance = "learned"
    noise_schedule: Kind = "cosine"
    diffusion_steps: int = 100
    noisy_end: bool = False

    def __post_init__(self, **more: Any) -> None:
        super().__post_init__(**more)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} is one of {', '.join(get_args(choices))}; got {getattr(self, name)!r}")
        if self.hidden_size % self.attention_heads:
            raise ValueError(
                f"hidden_size is a multiple of attention_heads; got {self.hidden_size} and {self.attention_heads}"
            )

    @property
    def tokens(self) -> int:
        """Tokens in a picture."""
        return self.grid**2

    @property
    def token_size(self) -> int:
        """Numbers in a token."""
        return self.channels * self.patch_size**2
