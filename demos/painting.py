"""One picture drawn token after token, twice: by the model alone, and with drafts of a small one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image, ImageColor
from torch import Tensor

import mmaccel
from demos.moments import Halted
from diffusion.autoregressive import ContinuousSpeculation
from diffusion.autoregressive.loading import load
from diffusion.autoregressive.rounds import BONUS, KEPT, PLAIN, REDRAWN
from diffusion.pictures import sheet
from mmaccel import pocket
from mmaccel.plots import COLOURS
from mmaccel.reports import figure

SIDE = 256  # pixels of a drawing
ORIGINS = {
    PLAIN: ("drawn by the model alone, before any draft", "#999999"),
    KEPT: ("a draft that was accepted", COLOURS[2]),
    REDRAWN: ("drawn again, because the draft was rejected", COLOURS[1]),
    BONUS: ("drawn by the model after a round of accepted drafts", COLOURS[5]),
}
LEGEND = "\n".join(
    f'- <span style="color:{colour}" aria-hidden="true">■</span> {words}' for words, colour in ORIGINS.values()
)
FIGURES = {
    "acceptance": "drafts accepted, share",
    "tokens_a_round": "tokens a round",
    "target_backbone_calls": "passes of the large model",
    "target_head_calls": "head calls of the large model",
    "seconds": "seconds",
}


@dataclass(frozen=True)
class Painted:
    """What is known so far.  figures: name, by the model alone, with drafts.  progress: in words."""

    plain: Image.Image | None = None
    speculative: Image.Image | None = None
    origins: Image.Image | None = None
    figures: tuple[tuple[str, str, str], ...] = ()
    progress: str = ""


def load_painter(folder: Path) -> tuple[Any, Any, Any]:
    """The model, its draft from the folder `draft` in its own, and the autoencoder that reads its latents, or None.

    The autoencoder lies in the folder `vae`; that of the pocket models is pocket-flow's.
    Raises FileNotFoundError if there is no draft.
    """
    if not (folder / "draft").is_dir():
        raise FileNotFoundError(
            f"{folder.name} has no folder `draft` with a small MARModel, which speculation needs; distil one as "
            "diffusion.autoregressive.training does"
        )
    vae = folder / "vae"
    if folder.parent == pocket.path("pocket-flow").parent:
        vae = pocket.path("pocket-flow") / "vae"
    decoder = None
    if vae.is_dir():
        from diffusers import AutoencoderKL

        decoder = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32, use_safetensors=True).eval()
    return load(folder)[0], load(folder / "draft")[0], decoder


def paint_twice(
    painter: tuple[Any, Any, Any],
    label: int,
    length: int,
    guidance: float,
    seed: int,
    stop: Event,
    show: Callable[[Painted], None],
) -> None:
    """Draws with the model alone and then with drafts; both follow the same distribution, with draws of their own."""
    model, draft, decoder = painter
    if not 0 <= label < model.config.classes:
        raise ValueError(f"this model draws the classes 0 to {model.config.classes - 1}; got {label}")
    state = Painted()

    def passed(count: int) -> None:
        nonlocal state
        state = dataclasses.replace(state, progress=f"{count} passes of the large model")
        show(state)

    def drawn() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        with counted(model, stop, passed):
            latents: Tensor = model.generate([label], generator=generator, guidance=guidance)
        return latents

    try:
        began = time.perf_counter()
        plain = drawn()
        seconds = time.perf_counter() - began
        state = dataclasses.replace(state, plain=as_picture(plain, decoder))
        show(state)
        with mmaccel.applied(model, ContinuousSpeculation(draft=draft, length=length)) as run:
            speculative, report = drawn(), run.report
    except Halted:
        show(dataclasses.replace(state, progress="stopped before the end"))
        return
    dense = {"seconds": seconds, **{name: report.quantities[name].dense for name in FIGURES if "calls" in name}}
    rows = []
    for name, words in FIGURES.items():
        plain_value: Any = dense.get(name, "")
        rows.append((words, figure(plain_value) if plain_value != "" else "", figure(report[name])))
    picture = as_picture(speculative, decoder)
    show(
        dataclasses.replace(
            state,
            speculative=picture,
            origins=coloured(report.details["origins"][0], picture),
            figures=tuple(rows),
            progress="",
        )
    )


@contextmanager
def counted(model: Any, stop: Event, passed: Callable[[int], None]) -> Iterator[None]:
    """Tells of every pass of the model's backbone.  Raises Halted at the first after `stop` is set."""
    count = 0

    def before(*_: Any) -> None:
        nonlocal count
        count += 1
        if stop.is_set():
            raise Halted
        if count % 8 == 1:
            passed(count)

    parts = list(model.backbone.children())
    layers = next(part for part in parts if isinstance(part, torch.nn.ModuleList))
    handle = layers[0].register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def as_picture(latents: Float[Tensor, "1 channels height width"], decoder: Any) -> Image.Image:
    """What the latents show: decoded, or, without an autoencoder, their first three channels."""
    if decoder is not None:
        with torch.no_grad():
            pixels = decoder.decode(latents / decoder.config.scaling_factor).sample / 2 + 0.5
    else:
        pixels = latents[:, torch.arange(3) % latents.shape[1]].sigmoid()
    return _square(sheet(pixels, [""]).crop((0, 16, *sheet(pixels, [""]).size)))


def coloured(origins: Int[Tensor, "rows columns"], picture: Image.Image) -> Image.Image:
    """Where each token comes from, as a colour over its place in the picture."""
    table = torch.tensor([ImageColor.getrgb(ORIGINS[kind][1]) for kind in sorted(ORIGINS)], dtype=torch.uint8)
    return Image.blend(picture.convert("RGB"), _square(Image.fromarray(table[origins].numpy())), 0.65)


def _square(picture: Image.Image) -> Image.Image:
    return picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)
