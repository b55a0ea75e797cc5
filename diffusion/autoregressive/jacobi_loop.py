"""The loop of speculative Jacobi decoding, in the place of a transformers model's own."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from diffusion.autoregressive.decoding import Decoding
from diffusion.autoregressive.jacobi import SpeculativeJacobi
from diffusion.autoregressive.origins import BONUS, KEPT, PLAIN, REDRAWN
from diffusion.autoregressive.verification import (
    accepted,
    accepted_by_group,
    accepted_by_neighbours,
    drawn,
    drawn_by,
    excess,
    fresh,
    neighbours,
    one_hot,
    prefix,
)
from mmaccel.methods import Unsupported
from mmaccel.reports import Report


class JacobiDecoding(Decoding):
    """Rounds of a window of tokens each.

    All rows of a batch commit as many tokens as the slowest; what a faster row has settled already is not tested again.
    """

    method: SpeculativeJacobi

    def __init__(self, method: SpeculativeJacobi, negative: Tensor | None, guidance: float) -> None:
        super().__init__(method, negative, guidance)
        self.commits: Counter[int] = Counter()
        self.noise: dict[int, Tensor] = {}

    def decode(self, input_ids: Tensor, end: int, stopping: Any) -> Tensor:
        self.prompt = input_ids.shape[1]
        self.generator, self.of_noise = (
            torch.Generator(input_ids.device).manual_seed(seed) for seed in torch.randint(2**62, (2,)).tolist()
        )
        read = 0  # tokens that the cache holds
        drafts, laws = input_ids[:, :0], None
        settled = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        self.origins = origins = input_ids[:, :0]
        while input_ids.shape[1] < end:
            many = min(self.method.window, end - input_ids.shape[1]) - 1
            if laws is not None or not many:
                drafts, laws = self._filled(input_ids, drafts, laws, many)
            else:
                drafts = drafts[:, :0]  # the first pass shows how many words there are
            p = self._laws(input_ids, drafts, read)
            tokens, done = self._settle(p, drafts, laws, settled, input_ids.shape[1])
            origins = self._origins(origins, tokens, done, settled)
            commit = int(done.min()) if drafts.shape[1] else 1
            chosen = self._until_stopped(input_ids, tokens[:, :commit], stopping)
            read = input_ids.shape[1] - 1 + commit
            surplus = 1 + drafts.shape[1] - commit
            if surplus:
                self.cache.crop(-surplus)
            self.committed += chosen.shape[1]
            self.commits[chosen.shape[1]] += 1
            self.origins = torch.cat([self.origins, origins[:, : chosen.shape[1]]], dim=1)
            input_ids = torch.cat([input_ids, chosen], dim=1)
            if bool(stopping(input_ids, None).all()):
                break
            drafts, laws, settled = tokens[:, commit:], p[:, commit:], (done - commit).clamp_min(0)
            origins = origins[:, commit:]
            for place in [place for place in self.noise if place < input_ids.shape[1]]:
                del self.noise[place]
        return input_ids

    # the model

    def _laws(self, input_ids: Tensor, drafts: Tensor, read: int) -> Tensor:
        """The laws of what follows the last committed token and each draft: [rows, 1 + drafts, words]."""
        window = torch.cat([input_ids[:, read:], drafts], dim=1)
        if self.negative is not None:
            other = window if read else torch.cat([self.negative, drafts], dim=1)
            window = torch.cat([window, other])
        mask = torch.cat(
            [self.mask, self.mask.new_ones(len(window), read + window.shape[1] - self.mask.shape[1])], dim=1
        )
        places = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, read:]
        extra = {"position_ids": places} if not bool(mask.all()) else {}
        start, asked = input_ids.shape[1], 1 + drafts.shape[1]
        logits = self.logits(window, asked, mask, **extra)
        return self.laws(logits, torch.cat([input_ids, drafts], dim=1), range(start, start + asked))

    # drafts

    def _filled(
        self, input_ids: Tensor, drafts: Tensor, laws: Tensor | None, many: int
    ) -> tuple[Tensor, Tensor | None]:
        """As many drafts as the window takes: those carried over, then fresh ones; and the law of each."""
        drafts = drafts[:, :many]
        if laws is None:
            return drafts, laws
        laws, words = laws[:, :many], laws.shape[-1]
        missing = many - drafts.shape[1]
        if not missing:
            return drafts, laws
        method = self.method
        low, high = method.first_word or 0, words if method.last_word is None else method.last_word + 1
        guesses = torch.randint(low, high, (len(input_ids), missing), generator=self.generator, device=input_ids.device)
        last = torch.cat([input_ids, drafts], dim=1)[:, -1]
        if method.initial == "sample-left":
            last = (laws[:, -1] if laws.shape[1] else self.latest).argmax(dim=-1)
        column = input_ids.shape[1] + drafts.shape[1] - self.prompt
        new = fresh(method.initial, guesses, last, column, method.row_length)
        law = one_hot(new, words)
        if method.initial == "uniform":
            law = torch.zeros_like(law)
            law[..., low:high] = 1 / (high - low)
        return torch.cat([drafts, new], dim=1), torch.cat([laws, law], dim=1)

    def _settle(
        self, p: Tensor, drafts: Tensor, q: Tensor | None, settled: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """The window's next tokens, and how many of each row are final."""
        self.latest = p[:, -1]
        if self.method.redraw == "gumbel":
            tokens = drawn_by(p, self._gumbels(p, start))
            return tokens, prefix(tokens[:, :-1] == drafts) + 1
        if q is None or not drafts.shape[1]:
            return drawn(p, self.generator), torch.ones_like(settled)
        uniforms = torch.rand(drafts.shape, generator=self.generator, device=drafts.device)
        group, slack = self.method.group, self.method.slack
        if group > 1:
            kept = accepted_by_group(drafts, p[:, :-1], q, uniforms, group)
        elif slack:
            words = torch.arange(p.shape[-1], device=p.device)
            near = neighbours(drafts, p[:, :-1], self.model.get_input_embeddings()(words).float(), slack)
            kept = accepted_by_neighbours(drafts, p[:, :-1], q, uniforms, near)
            q = q.masked_fill(near, 0.0)
        else:
            kept = accepted(drafts, p[:, :-1], q, uniforms)
        kept = kept | (torch.arange(drafts.shape[1], device=drafts.device) < settled[:, None])
        done = prefix(kept) + 1
        turned = torch.where(kept, drafts, drawn(excess(p[:, :-1], q), self.generator))
        tokens = torch.cat([turned, drawn(p[:, -1:], self.generator)], dim=1)
        if self.method.redraw == "independent":
            behind = torch.arange(tokens.shape[1], device=tokens.device) >= done[:, None]
            tokens = torch.where(behind, drawn(p, self.generator), tokens)
        return tokens, done

    def _origins(self, before: Tensor, tokens: Tensor, done: Tensor, settled: Tensor) -> Tensor:
        """Where the window's tokens come from, as `origins` names it; what was settled `before` keeps its name."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        last = BONUS if tokens.shape[1] > 1 else PLAIN
        end = torch.where(done < tokens.shape[1], REDRAWN, last)[:, None]
        found = torch.where(place < done[:, None] - 1, KEPT, end)
        kept = place[: before.shape[1]] < settled[:, None]
        found[:, : before.shape[1]] = torch.where(kept, before, found[:, : before.shape[1]])
        return found

    def _gumbels(self, p: Tensor, start: int) -> Tensor:
        """The noise of the positions from `start` on, drawn once each, in order."""
        for place in range(start, start + p.shape[1]):
            if place not in self.noise:
                uniforms = torch.rand(p.shape[::2], generator=self.of_noise, device=p.device, dtype=torch.float64)
                self.noise[place] = -(-(uniforms.clamp_min(1e-300)).log()).log().to(p)
        return torch.stack([self.noise[place] for place in range(start, start + p.shape[1])], dim=1)

    # the end

    def _until_stopped(self, input_ids: Tensor, tokens: Tensor, stopping: Any) -> Tensor:
        for count in range(1, tokens.shape[1]):
            if bool(stopping(torch.cat([input_ids, tokens[:, :count]], dim=1), None).all()):
                return tokens[:, :count]
        return tokens

    def tell(self, report: Report) -> None:
        """How often so many tokens were committed, and where each comes from."""
        report.facts["commits"] = dict(sorted(self.commits.items()))
        side = math.isqrt(self.origins.shape[1])
        if side**2 == self.origins.shape[1]:  # a square picture
            report.details["origins"] = self.origins.reshape(-1, side, side).cpu()

    def check(self, input_ids: Tensor, processors: Any, stopping: Any, config: Any, kwargs: dict[str, Any]) -> None:
        if config.eos_token_id is not None and len(input_ids) > 1:
            raise Unsupported(
                "rows of a batch that may end at different places; draw them one by one, or set "
                "generation_config.eos_token_id = None"
            )
        super().check(input_ids, processors, stopping, config, kwargs)
