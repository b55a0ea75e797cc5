"""The loop of ZipAR's decoding: a front of one token a row moves down the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from diffusion.autoregressive.decoding import Decoding
from diffusion.autoregressive.verification import accepted, drawn, excess
from diffusion.autoregressive.visibility import visible
from diffusion.autoregressive.zipar import ZipAR
from mmaccel.methods import Unsupported
from mmaccel.reports import Report


@dataclass
class Front:
    """How far the rows of a picture are.  A place is a token's number in raster order.

    drawn: tokens of each row that are there.  read: those of them whose keys and values the cache holds.
    tentative: whether the first token of the row that began last may yet be redrawn.
    """

    rows: int
    columns: int
    drawn: list[int] = field(init=False)
    read: list[int] = field(init=False)
    tentative: bool = False

    def __post_init__(self) -> None:
        self.drawn, self.read = [1] + [0] * (self.rows - 1), [0] * self.rows

    @property
    def done(self) -> bool:
        """Whether the picture is there."""
        return self.drawn[-1] == self.columns

    def unread(self) -> list[int]:
        """The places of the newest tokens, one a row, in raster order."""
        return [
            row * self.columns + read
            for row, (read, drawn) in enumerate(zip(self.read, self.drawn, strict=True))
            if read < drawn
        ]

    def opening(self, window: int) -> int | None:
        """The row whose first token is drawn, or tested, in the next pass, if there is one."""
        begun = sum(drawn > 0 for drawn in self.drawn)
        if self.tentative:
            return begun - 1
        ready = begun < self.rows and self.drawn[begun - 1] >= min(window, self.columns)
        return begun if ready else None


def filled(
    grid: Int[Tensor, "images places"], drawn: Int[Tensor, "rows"], end_of_row: int | None
) -> Int[Tensor, "images places"]:
    """Pictures with something at every place: the nearest token above where there is none yet.

    drawn: how many tokens of each row are there.  In the first row the last one stands in.  end_of_row: what stands in
    at the end of every row, if it is a word.
    """
    rows = len(drawn)
    columns = torch.arange(grid.shape[1] // rows, device=drawn.device)
    there = columns < drawn[:, None]
    numbers = torch.arange(rows, device=drawn.device)[:, None]
    above = torch.where(there, numbers, -1).cummax(dim=0).values
    source = torch.where(above >= 0, above * len(columns) + columns, drawn[0] - 1)
    found = grid[:, source.flatten()]
    if end_of_row is not None:
        ends = ~there & (columns == len(columns) - 1)
        found = found.masked_fill(ends.flatten(), end_of_row)
    return found


def sight(reading: list[int], kept: list[int], stands_in: bool) -> Bool[Tensor, "reading keys"]:
    """Which places see which: what is before them in raster order, and themselves; a stand-in, the last, only itself.

    reading: the places of a pass.  kept: those in the cache, which are keys, too.
    """
    queries, keys = torch.tensor(reading), torch.tensor([*kept, *reading])
    seen = keys <= queries[:, None]
    if stands_in:
        seen[:-1, -1] = False
    return seen


class ZipDecoding(Decoding):
    """Passes of one token of each row that is begun and not full.  The pictures of a batch are equally far.

    windows: by how many passes each row but the first began after the one above.  missing, before: over all tokens, how
    many tokens of the picture before it a token was drawn without, and how many there are.
    """

    method: ZipAR
    law: Tensor  # that the first token of the row which began last was drawn by
    known: int  # how many tokens of the picture that law knows
    open: Bool[Tensor, "images"]  # where that token may yet be redrawn

    def decode(self, input_ids: Tensor, end: int, stopping: Any) -> Tensor:
        self.prompt, self.committed = input_ids, end - input_ids.shape[1]
        self.front = Front(self.committed // self.columns, self.columns)
        self.grid = input_ids.new_zeros(len(input_ids), self.committed)
        self.kept: list[int] = []
        self.windows: list[int] = []
        self.missing = self.before = 0
        self.grid[:, 0] = drawn(self._first())[:, 0]
        while not self.front.done:
            self._pass()
        return torch.cat([input_ids, self.grid], dim=1)

    def _pass(self) -> None:
        """Reads the newest token of every row that is not full, and draws what follows each."""
        front, columns = self.front, self.columns
        cells, row = front.unread(), front.opening(self.method.window)
        stands_in = row is not None and front.drawn[row - 1] < columns
        places = [*cells, row * columns - 1] if row is not None and stands_in else cells
        seen = sight(places, self.kept, stands_in)
        p = self._laws(places, seen)
        fresh, known = drawn(p), seen.sum(dim=1).tolist()
        if row is not None:
            at = places.index(row * columns - 1)
            if self._redrawn(row, p[:, at], fresh[:, at], known[at] - stands_in):
                cells = cells[:-1]
        if surplus := len(places) - len(cells):
            self.cache.crop(-surplus)
        self.kept += cells
        for at, place in enumerate(cells):
            front.read[place // columns] += 1
            if (place + 1) % columns:
                self._put(place + 1, fresh[:, at], known[at])

    def _redrawn(self, row: int, p: Tensor, fresh: Tensor, known: int) -> bool:
        """Draws the first token of a row, or tests the one that is there against its law p; whether any was redrawn.

        A token x that the pass before drew by the law q is kept if u < p(x)/q(x), else drawn from the excess of p over
        q.  Kept and redrawn together have the law p; a redrawn one waits for the next test, unless p knows the whole
        row above.
        """
        front, place, above = self.front, row * self.columns, self.front.drawn[row - 1]
        whole, redrawn = above == self.columns, False
        if front.tentative:
            tokens, uniforms = self.grid[:, place], torch.rand(len(p), 1, device=p.device)
            kept = accepted(tokens[:, None], p[:, None], self.law[:, None], uniforms)[:, 0] | ~self.open
            self.grid[:, place] = torch.where(kept, tokens, drawn(excess(p, self.law)[:, None])[:, 0])
            self.open, redrawn = ~kept, not bool(kept.all())
            self.missing += self.known - known
            above -= not redrawn  # the row's second token comes from this pass, too
        else:
            self._put(place, fresh, known)
            self.open = torch.ones_like(fresh, dtype=torch.bool)
        self.law, self.known = p, known
        front.tentative = self.method.adaptive and not whole and bool(self.open.any())
        if not front.tentative:
            self.windows.append(above)
        return redrawn

    def _put(self, place: int, tokens: Tensor, known: int) -> None:
        """Tokens at a place that was empty, drawn in sight of so many of the picture's tokens before it."""
        self.grid[:, place] = tokens
        self.front.drawn[place // self.columns] += 1
        self.missing, self.before = self.missing + place - known, self.before + place

    # the model

    def _first(self) -> Tensor:
        """The law of the first token: the prompts are read as plain decoding reads them."""
        words = self.prompt if self.negative is None else torch.cat([self.prompt, self.negative])
        places = (self.mask.cumsum(dim=1) - 1).clamp_min(0)
        extra = {} if bool(self.mask.all()) else {"position_ids": places}
        return self.laws(self.logits(words, 1, self.mask, **extra), self.prompt, [self.prompt.shape[1]])

    def _laws(self, places: list[int], seen: Tensor) -> Tensor:
        """The laws of what follows each place: [images, places, words]."""
        device, start = self.grid.device, self.prompt.shape[1]
        whole = filled(self.grid, torch.tensor(self.front.drawn, device=device), self.method.end_of_row)
        branches = len(self.mask) // len(self.grid)
        prompt = self.mask.bool()[:, None].expand(-1, len(places), -1)
        seen = torch.cat([prompt, seen.to(device).expand(len(prompt), -1, -1)], dim=-1)
        positions = self.mask.sum(dim=1, keepdim=True) + torch.tensor(places, device=device)
        with visible(self.model, seen) as mask:
            words = whole[:, places].repeat(branches, 1)
            logits = self.logits(words, len(places), mask, position_ids=positions)
        return self.laws(logits, torch.cat([self.prompt, whole], dim=1), [start + place + 1 for place in places])

    # what is reported, and what is refused

    def tell(self, report: Report) -> None:
        """The picture's shape, by how many passes rows began after those above them, and what tokens did not see."""
        report.record("missing", self.missing / max(self.before, 1))
        report.facts |= {"picture_rows": self.front.rows, "row_length": self.columns, "windows": self.windows}

    def check(self, input_ids: Tensor, processors: Any, stopping: Any, config: Any, kwargs: dict[str, Any]) -> None:
        super().check(input_ids, processors, stopping, config, kwargs)
        name, tokens = self.method.name, config.max_length - input_ids.shape[1]
        others = {type(criterion).__name__ for criterion in stopping} - {"MaxLengthCriteria"}
        if config.eos_token_id is not None or others:
            raise Unsupported(
                f"{name} draws whole pictures, and stops at no word or time; got eos_token_id={config.eos_token_id}, "
                f"{', '.join(sorted(others))}. Set generation_config.eos_token_id = None, and pass no other criteria"
            )
        side = math.isqrt(tokens)
        if self.method.row_length is None and side**2 != tokens:
            raise Unsupported(
                f"{name} needs the length of a picture's rows: {tokens} new tokens are no square. Set row_length, and "
                "max_new_tokens to the tokens of a picture"
            )
        self.columns = self.method.row_length or side
        if tokens % self.columns:
            raise Unsupported(
                f"{tokens} new tokens are no whole rows of {self.columns}; set max_new_tokens to a multiple of that"
            )
