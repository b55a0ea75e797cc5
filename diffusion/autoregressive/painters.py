"""Pictures from models of both kinds of tokens, drawn and shown in one way: the command, the bench and the page ask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion.autoregressive.codebooks import Codebook
from diffusion.autoregressive.jacobi import SpeculativeJacobi
from diffusion.autoregressive.loading import load
from diffusion.autoregressive.modeling import MARModel
from diffusion.autoregressive.speculation import ContinuousSpeculation
from mmaccel import pocket
from mmaccel.checkpoints import find_folder
from mmaccel.methods import Method
from mmaccel.registry import suggest


class Painter(ABC):
    """A model that draws pictures of classes, and what shows what it drew."""

    model: Any

    @property
    @abstractmethod
    def classes(self) -> int:
        """How many classes it draws."""

    @property
    @abstractmethod
    def speculation(self) -> Method:
        """The method that speeds it up, with the settings that suit."""

    @property
    @abstractmethod
    def components(self) -> Mapping[str, Any]:
        """Its parts by name."""

    @abstractmethod
    def draw(self, labels: Sequence[int], seed: int, **settings: Any) -> Tensor:
        """A picture of each class, as the model gives it.  settings: of the model's `generate`."""

    @abstractmethod
    def shown(self, drawn: Tensor) -> Float[Tensor, "images 3 height width"]:
        """Drawn pictures in 0..1."""

    def label(self, text: str) -> int:
        """The class of this name or number.  Raises ValueError, with the nearest name, if there is none."""
        names = {str(name): int(number) for number, name in self.model.config.id2label.items()}
        known = {name: number for name, number in names.items() if number < self.classes and name[:6] != "LABEL_"}
        wanted = text.strip().lower().removeprefix("a ")
        if wanted.isdecimal() and int(wanted) < self.classes:
            return int(wanted)
        if wanted not in known:
            mend = f"; {suggest(wanted, known)}" if known else ""
            raise ValueError(f"this model draws the classes 0 to {self.classes - 1}; got {text!r}{mend}")
        return known[wanted]


@dataclass(frozen=True)
class ContinuousPainter(Painter):
    """A `MARModel`.  draft: its small one, or None.  decoder: the autoencoder of its latents, or None."""

    model: MARModel
    draft: MARModel | None
    decoder: Any

    @property
    def classes(self) -> int:
        return int(self.model.config.classes)

    @property
    def components(self) -> Mapping[str, Any]:
        return {"model": self.model, "draft": self.draft, "decoder": self.decoder}

    @property
    def speculation(self) -> ContinuousSpeculation:
        """Raises FileNotFoundError if there is no draft."""
        if self.draft is None:
            raise FileNotFoundError(
                "this model has no folder `draft` with a small MARModel, which speculation needs; distil one as "
                "diffusion.autoregressive.training does, and save it there"
            )
        mode: Any = "mixture" if self.model.config.head == "mixture" else "exact"
        length = 4 if self.draft.backbone is not None else 1  # which saves calls of the head alone
        return ContinuousSpeculation(draft=self.draft, mode=mode, length=length, prefill=0.0)

    def draw(self, labels: Sequence[int], seed: int, **settings: Any) -> Tensor:
        generators = [torch.Generator().manual_seed(seed + number) for number in range(len(labels))]
        return self.model.generate(list(labels), generator=generators, **settings)

    def shown(self, drawn: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images 3 up across"]:
        """Decoded, or, without an autoencoder, the latents' first three channels."""
        if self.decoder is None:
            return drawn[:, torch.arange(3) % drawn.shape[1]].sigmoid()
        with torch.no_grad():
            pixels: Tensor = self.decoder.decode(drawn / self.decoder.config.scaling_factor).sample
        return (pixels / 2 + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class DiscretePainter(Painter):
    """A causal language model of image tokens.

    The words behind those of the codebook start a picture: one for each class, and the last for a picture of any.
    """

    model: Any
    codebook: Codebook

    @property
    def classes(self) -> int:
        return int(self.model.config.vocab_size) - 1 - len(self.codebook.clusters)

    @property
    def components(self) -> Mapping[str, Any]:
        return {"model": self.model}

    @property
    def speculation(self) -> SpeculativeJacobi:
        return SpeculativeJacobi(last_word=len(self.codebook.clusters) - 1)

    def prompts(self, labels: Sequence[int]) -> Int[Tensor, "images 1"]:
        """The words that pictures of these classes start with."""
        return torch.tensor([[len(self.codebook.clusters) + label] for label in labels])

    def draw(self, labels: Sequence[int], seed: int, *, guidance: float = 1.0, **settings: Any) -> Tensor:
        """guidance: how far to go from a picture of any class towards, and past, one of the wanted."""
        prompts = self.prompts(labels)
        if guidance != 1:
            settings |= {"guidance_scale": guidance, "negative_prompt_ids": torch.full_like(prompts, self.any_class)}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tokens: Tensor = self.model.generate(prompts, **settings)
        return tokens[:, 1:]

    @property
    def any_class(self) -> int:
        """The word that starts a picture of any class."""
        return int(self.model.config.vocab_size) - 1

    def shown(self, drawn: Int[Tensor, "images tokens"]) -> Float[Tensor, "images 3 height width"]:
        return (self.codebook.decode(drawn) / 2 + 0.5).clamp(0, 1)


def load_painter(model: str | Path) -> Painter:
    """A painter from disk.

    model: a folder that `save_pretrained` wrote, or the name of a pocket model.  For continuous tokens its folder
    `draft` may hold a draft, and `vae` the autoencoder; that of the pocket models is pocket-flow's.  For discrete ones
    it holds a codebook.  Raises FileNotFoundError or ValueError that names what is wrong, and the mend.
    """
    folder = find_folder(model)
    loaded, _ = load(folder)
    if not isinstance(loaded, MARModel):
        return DiscretePainter(loaded, Codebook.from_pretrained(folder))
    draft = load(folder / "draft")[0] if (folder / "draft").is_dir() else None
    vae = folder / "vae"
    if folder.parent == pocket.path("pocket-flow").parent:
        vae = pocket.path("pocket-flow") / "vae"
    decoder = None
    if vae.is_dir():
        from diffusers import AutoencoderKL

        decoder = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32, use_safetensors=True).eval()
    return ContinuousPainter(loaded, draft, decoder)
