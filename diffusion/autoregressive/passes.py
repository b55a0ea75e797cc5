"""One model in one run: its caches, its conditions, its laws, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from diffusion.autoregressive.backbones import MaskedBackbone
from diffusion.autoregressive.chains import Chain, Draws, Gaussians, walk
from diffusion.autoregressive.layers import KeyValues, Place
from diffusion.autoregressive.mixtures import MixtureLaw
from diffusion.autoregressive.modeling import UNCONDITIONAL, MARModel
from diffusion.autoregressive.orders import guidance_by_token
from diffusion.autoregressive.settings import Sampling
from mmaccel.ledger import Ledger

Law = Chain | MixtureLaw


class Spender(Protocol):
    """Who pays for a call of the head."""

    def __call__(self, rows: int) -> Any: ...


class ModelRun:
    """A model that draws the images of one run, or drafts for them.

    Sequences are in the order of drawing: token i of `tokens` lies at position order[i] of the picture.
    name: under which the ledger counts its calls.  labels: [rows].  order: [rows, tokens].
    trunk: the run whose conditions this model's head reads, if it has no backbone.
    """

    def __init__(
        self,
        model: MARModel,
        name: str,
        labels: Tensor,
        order: Tensor,
        sampling: Sampling,
        ledger: Ledger,
        trunk: ModelRun | None = None,
    ) -> None:
        self.model, self.name, self.order, self.ledger, self.trunk = model, name, order, ledger, trunk
        self.branches = 1 if sampling.guidance == 1 else 2
        self.rows = len(labels)
        config = model.config
        self.guidance = guidance_by_token(
            sampling.guidance, sampling.guidance_schedule, config.tokens, sampling.steps or config.tokens
        ).to(device=labels.device, dtype=model.dtype)
        self.make_law = model.head.laws(sampling.temperature, sampling.diffusion_steps or config.diffusion_steps)
        if trunk is None:
            both = torch.cat([labels, torch.full_like(labels, UNCONDITIONAL)]) if self.branches == 2 else labels
            self.label = model.embed_labels(both)
            self.filled = torch.zeros(self.rows, dtype=torch.long, device=labels.device)
            self.cache = None if self.masked else KeyValues(config, len(both), self.label)

    @property
    def masked(self) -> bool:
        """Whether it sees tokens in any order, and has no cache."""
        return isinstance(self.model.backbone, MaskedBackbone)

    def law(self, conditions: Float[Tensor, "branches chosen width"], places: Int[Tensor, "chosen"]) -> Law:
        """The laws of single tokens, each from its condition and its place in the sequence."""
        law = self.make_law(conditions, self.guidance[places])
        return law if isinstance(law, MixtureLaw) else Counted(law, self._head)

    def conditions(
        self,
        tokens: Float[Tensor, "images tokens size"],
        rows: Int[Tensor, "rows"],
        start: Int[Tensor, "rows"],
        count: Int[Tensor, "rows"],
    ) -> Float[Tensor, "branches rows most width"]:
        """Conditions of `count` tokens from `start` on, each given all tokens before it.

        rows: of the run, ascending.  Behind its own count a row holds something finite without meaning.
        """
        if self.trunk is not None:
            return self.trunk.conditions(tokens, rows, start, count)[: self.branches]
        return self._pairs(tokens, rows, start, count) if self.masked else self._cached(tokens, rows, start, count)

    def conditions_together(
        self, tokens: Float[Tensor, "images tokens size"], rows: Int[Tensor, "rows"], start: int, count: int
    ) -> Float[Tensor, "branches rows count width"]:
        """Conditions of `count` tokens from `start` on, all given the tokens before `start`.  Masked models only."""
        rank = self.order[rows].argsort(dim=1)
        found = self._seen(tokens[rows].gather(1, _wide(rank, tokens)), rank < start, rows)
        return found.gather(2, self._places(rows, start, count, found))

    def _pairs(self, tokens: Tensor, rows: Tensor, start: Tensor, count: Tensor) -> Tensor:
        """One set of visible tokens for each pair of row and token."""
        most = int(count.max())
        row, step = (torch.arange(most, device=rows.device) < count[:, None]).nonzero(as_tuple=True)
        place = start[row] + step
        rank = self.order[rows].argsort(dim=1)
        spatial = tokens[rows].gather(1, _wide(rank, tokens))
        found = self._seen(spatial[row], rank[row] < place[:, None], rows[row])
        conditions = found.new_zeros(self.branches, len(rows), most, found.shape[-1])
        conditions[:, row, step] = found[:, torch.arange(len(row), device=rows.device), self.order[rows[row], place]]
        return conditions

    def _seen(self, spatial: Tensor, visible: Tensor, rows: Tensor) -> Tensor:
        """All conditions of sets of visible tokens, [branches, sets, tokens, width]."""
        many = self.branches
        with self._spend("backbone", len(rows) * many):
            found = cast(Any, self.model.backbone)(
                spatial.repeat(many, 1, 1), visible.repeat(many, 1), self.label[self._of_branches(rows)]
            )
        found = rearrange(found, "(branches sets) tokens width -> branches sets tokens width", branches=many)
        return cast(Tensor, found)

    def _places(self, rows: Tensor, start: int, count: int, found: Tensor) -> Tensor:
        places = self.order[rows, start : start + count]
        return _wide(places, found).expand(self.branches, -1, -1, -1)

    def _cached(self, tokens: Tensor, rows: Tensor, start: Tensor, count: Tensor) -> Tensor:
        """One pass over what each row's cache lacks; rows that lack less read some inputs again."""
        end = start + count
        lacking = int((end - torch.minimum(self.filled[rows], start)).max())
        positions = (end[:, None] - lacking + torch.arange(lacking, device=rows.device)).clamp_min(0)
        inputs = tokens[rows[:, None], (positions - 1).clamp_min(0)]
        both, many = self._of_branches(rows), self.branches
        place = Place(both, positions.repeat(many, 1))
        with self._spend("backbone", len(both)):
            found = cast(Any, self.model.backbone)(inputs.repeat(many, 1, 1), self.label[both], place, self.cache)
        self.filled[rows] = end
        step = torch.arange(int(count.max()), device=rows.device)
        picked = (lacking - count[:, None] + step).clamp_max(lacking - 1).repeat(many, 1)
        found = found.gather(1, _wide(picked, found))
        return cast(Tensor, rearrange(found, "(branches rows) n width -> branches rows n width", branches=many))

    def _of_branches(self, rows: Tensor) -> Tensor:
        return torch.cat([rows + branch * self.rows for branch in range(self.branches)])

    def _head(self, rows: int) -> Any:
        return self._spend("head", rows * self.branches)

    @contextmanager
    def _spend(self, part: str, rows: int) -> Iterator[None]:
        with self.ledger.spend(f"{self.name}_{part}_calls", 1), self.ledger.spend(f"{self.name}_{part}_rows", rows):
            yield


@dataclass(frozen=True)
class Counted:
    """A chain whose calls are paid for."""

    chain: Chain
    spend: Spender

    @property
    def steps(self) -> int:
        return self.chain.steps

    @property
    def size(self) -> int:
        return self.chain.size

    @property
    def noisy_end(self) -> bool:
        return self.chain.noisy_end

    @property
    def fixed(self) -> Tensor:
        return self.chain.fixed

    def at(self, rows: Tensor) -> Counted:
        return Counted(self.chain.at(rows), self.spend)

    def __call__(self, states: Tensor, indices: Tensor) -> Gaussians:
        with self.spend(states.shape[0] * states.shape[1]):
            return self.chain(states, indices)


def draw(law: Law, draws: Draws) -> Float[Tensor, "rows size"]:
    """One token a row.  Raises ValueError if the head gives what is no number."""
    token = law.draw(draws) if isinstance(law, MixtureLaw) else walk(law, draws).token
    return checked(token)


def checked(token: Tensor) -> Tensor:
    """The tokens, if they are finite.  Raises ValueError with the mend."""
    if not bool(token.isfinite().all()):
        raise ValueError(
            "a head drew a token that is not finite: too few training steps under the cosine schedule, or half "
            "precision, do that; run the model in float32, or train it with velocity prediction and log-SNR levels"
        )
    return token


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand(*index.shape, like.shape[-1])
