"""Plain generation: token after token, or several a step, each from the target's own law."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Generator, Tensor

from diffusion.autoregressive.modeling import NO_BACKBONE, UNCONDITIONAL, MARModel
from diffusion.autoregressive.orders import tokens_a_step
from diffusion.autoregressive.passes import ModelRun, draw
from diffusion.autoregressive.randomness import Randomness
from diffusion.autoregressive.settings import Sampling
from mmaccel.ledger import Ledger
from mmaccel.registry import suggest


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of `generate`, its arguments understood: labels [images], order [images, tokens]."""

    model: MARModel
    labels: Tensor
    order: Tensor
    sampling: Sampling
    randomness: Randomness

    def run(self, model: MARModel, name: str, ledger: Ledger, trunk: ModelRun | None = None) -> ModelRun:
        """This model in a run of the call.  trunk: the run whose conditions it reads, if it has no backbone."""
        return ModelRun(model, name, self.labels, self.order, self.sampling, ledger, trunk)

    def blank(self) -> Tensor:
        """Tokens not yet drawn, [images, tokens, size], in the order of drawing."""
        config = self.model.config
        return torch.zeros(len(self.labels), config.tokens, config.token_size).to(self.model.unconditional)

    def latents(self, tokens: Tensor) -> Tensor:
        """The images of drawn tokens."""
        order = self.order[..., None].expand_as(tokens)
        return self.model.to_latents(torch.zeros_like(tokens).scatter(1, order, tokens))


def generate(
    model: MARModel,
    labels: int | Sequence[int] | Tensor | None,
    num_images: int | None,
    generator: Generator | Sequence[Generator] | None,
    **settings: Any,
) -> Tensor:
    """`MARModel.generate`."""
    call = understood(model, labels, num_images, generator, settings)
    with torch.no_grad():
        return call.latents(plain_tokens(call, call.run(model, "target", Ledger())))


def plain_tokens(call: Call, target: ModelRun) -> Tensor:
    """All tokens, in the order of drawing, [images, tokens, size]."""
    tokens, rows, config = call.blank(), torch.arange(len(call.labels)).to(call.labels), call.model.config
    done = 0
    for count in tokens_a_step(config.tokens, call.sampling.steps or config.tokens):
        draw_step(call, target, tokens, rows, done, count)
        done += count
    return tokens


def draw_step(call: Call, target: ModelRun, tokens: Tensor, rows: Tensor, done: int, count: int) -> None:
    """Draws `count` tokens of every row, independent of each other given the `done` before them, into `tokens`."""
    if count == 1:
        conditions = target.conditions(tokens, rows, torch.full_like(rows, done), torch.ones_like(rows))
    else:
        conditions = target.conditions_together(tokens, rows, done, count)
    places = torch.arange(done, done + count, device=rows.device)
    law = target.law(
        rearrange(conditions, "branches rows n width -> branches (rows n) width"), places.repeat(len(rows))
    )
    drawn = draw(law, call.randomness.at(rows.repeat_interleave(count)))
    tokens[:, places] = rearrange(drawn, "(rows n) size -> rows n size", n=count)


def understood(
    model: MARModel,
    labels: int | Sequence[int] | Tensor | None,
    num_images: int | None,
    generator: Generator | Sequence[Generator] | None,
    settings: dict[str, Any],
) -> Call:
    """The call's arguments, checked.  Raises ValueError or TypeError that say what was given and the mend."""
    if model.backbone is None:
        raise ValueError(NO_BACKBONE)
    config, device = model.config, model.device
    known = [field.name for field in dataclasses.fields(Sampling)]
    if unknown := sorted(set(settings) - set(known)):
        raise TypeError(f"generate has no setting {unknown[0]!r}; {suggest(unknown[0], known)}")
    sampling = Sampling(**settings)
    if config.attention == "causal" and sampling.steps not in (None, config.tokens):
        raise ValueError(
            f"a causal model draws one token a step, {config.tokens} in all; got steps={sampling.steps!r}. "
            "Leave it away, or take a masked model"
        )
    given = torch.as_tensor([UNCONDITIONAL] if labels is None else labels, device=device).reshape(-1)
    if sampling.guidance != 1 and labels is None:
        raise ValueError(f"guidance={sampling.guidance} leads towards a label, and labels=None has none; pass labels")
    if labels is not None and not (len(given) and bool(((given >= 0) & (given < config.classes)).all())):
        raise ValueError(f"labels are classes from 0 to {config.classes - 1}; got {labels!r}")
    images = len(given) if num_images is None else num_images
    if images < 1 or images % len(given):
        raise ValueError(
            f"num_images is the number of images in all, the same for each label; got {num_images!r} for "
            f"{len(given)} labels. Pass a multiple of {len(given)}"
        )
    rows = given.repeat_interleave(images // len(given))
    randomness = Randomness.of(generator, images, model.unconditional)
    return Call(model, rows, draw_order(config, randomness).to(device), sampling, randomness)


def draw_order(config: Any, randomness: Randomness) -> Tensor:
    """The position of the picture that each step draws, [images, tokens]: raster, or at random in masked models."""
    if config.attention == "causal":
        return torch.arange(config.tokens).expand(len(randomness.rows), -1)
    return randomness.normal(config.tokens).argsort(dim=1)
