"""Visual tokens that rest, layer by layer, on the keys and values of the step before.

Rides on the freezing mechanism of `vision_tokens`: a layer runs on the tokens that work, and its cache puts the others'
keys and values among theirs, in the order of the sequence; here they come from the last step of the same episode.
"""

from __future__ import annotations

import functools
import math
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmaccel.methods import Unsupported
from robotics.episodes import Acting, RowMemory, acting, forget_at_reset
from robotics.flow import is_pi0
from robotics.gaze_flow import Prefixed
from robotics.policies import Policy, cameras_of
from robotics.vla_cache import VLACache, looked_at, patch_similarity, reusable, reuse_shares, still
from vision_tokens.attention_rows import asking_rows, listen, recording
from vision_tokens.cutting import Cutter
from vision_tokens.families import Host, find_host
from vision_tokens.freezing import Freezer
from vision_tokens.gathering import gather
from vision_tokens.inside import InsideMechanism
from vision_tokens.layer_columns import LayerColumns, current_run, taken
from vision_tokens.layer_cutting import LayerCutter
from vision_tokens.layer_view import LayerView, sees_the_future
from vision_tokens.looking_ahead import attention_of
from vision_tokens.prompts import padding_of, refuse_flash, refuse_other_kernel, refuse_static, visual_places
from vision_tokens.resting import Joining, Split, all_rows, rows_of_mask

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment

Pair = tuple[Tensor, Tensor]


@dataclass
class Frame:
    """A row's last step.

    positions: of its visual tokens, counted without padding.  cameras: the picture behind each.
    attention: what the words gave each visual token.  entropy: of each layer's attention in the episode's first step.
    pairs: by layer, keys and values of the visual tokens, [heads, visual, width].
    """

    positions: Int[Tensor, " visual"]
    pictures: tuple[Tensor, ...]
    camera: Int[Tensor, " visual"]
    attention: Float[Tensor, " visual"]
    entropy: Float[Tensor, " layers"]
    pairs: list[Pair]


@dataclass
class Reading:
    """A prompt that is being read.

    rest_from: the first layer in which each token rests; as many as there are layers if it works in all.
    splits: by layer that some rest in.  rest: their hidden states, in the layer that is running.
    """

    call: Acting
    visual: Bool[Tensor, "batch tokens"]
    real: Bool[Tensor, "batch tokens"]
    camera: Int[Tensor, "batch tokens"]
    rest_from: Int[Tensor, "batch tokens"]
    frames: list[Frame | None]
    recorded: Any
    splits: dict[int, Split] = field(default_factory=dict)
    rest: Tensor | None = None


_reading: ContextVar[Reading | None] = ContextVar("reading", default=None)


class Reuser(InsideMechanism):
    """The method's hooks on one model."""

    def __init__(self, method: VLACache, host: Host, attachment: Attachment) -> None:
        super().__init__(method, host, attachment)
        self.method = method
        self.layers = host.decoder_layers
        self.words_in = len(self.layers) * 15 // 32  # the released code's layer 15 of 32
        self.frames: RowMemory[Frame] = RowMemory()

    def attach(self) -> None:
        """Registers every hook.  Raises `Unsupported` for flash attention."""
        refuse_flash(self.method, self.kernel)
        self.take_place(Cutter, LayerCutter, Freezer)
        LayerColumns.of(self.host, self.attachment)
        listen(self.attachment, [attention_of(layer) for layer in self.layers])
        self.attach_to_text()
        for number, layer in enumerate(self.layers):
            self.attachment.pre_hook(layer, functools.partial(self.before, number))
            self.attachment.hook(layer, functools.partial(self.after, number))
        forget_at_reset(self.attachment, self.frames)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Says from which layer on each token of a prompt rests."""
        self._stop()
        run, visual, call = current_run(), visual_places(), acting()
        if run is None or visual is None or call is None or not bool(visual.any()):
            return
        kwargs = {**dict(zip(self.text_names, args, strict=False)), **kwargs}
        refuse_static(self.method, kwargs.get("past_key_values"))
        refuse_other_kernel(self.method, self.host, self.kernel)
        real = padding_of(kwargs.get("attention_mask"), run.new)
        real = torch.ones_like(visual) if real is None else real
        camera = cameras_of(visual, call.shown)
        frames = [self.frames[row] for row in call.rows]
        rest_from = torch.full(visual.shape, len(self.layers), device=run.device)
        for row, frame in enumerate(frames):
            places = visual[row].nonzero().flatten()
            if frame is not None and torch.equal(frame.positions, position_of(places, real[row])):
                pictures = tuple(own[row] for own in call.images)
                rest_from[row, places] = self._rest_from(frame, pictures)
        begins = any(frame is None for frame in frames)
        reads = range(len(self.layers)) if begins else (self.words_in,)
        readers = {attention_of(self.layers[number]): self._reader(number, begins) for number in reads}
        recorder = recording(readers)
        _reading.set(Reading(call, visual, real, camera, rest_from, frames, (recorder, recorder.__enter__())))

    def _rest_from(self, frame: Frame, pictures: tuple[Tensor, ...]) -> Int[Tensor, " visual"]:
        """The first layer in which each visual token of a row rests."""
        method, layers = self.method, len(self.layers)
        similarity = torch.zeros(len(frame.camera), device=frame.camera.device)
        static = []
        for number in sorted(set(frame.camera.tolist())):
            own = (frame.camera == number).nonzero().flatten()
            side = math.isqrt(len(own))
            if side * side != len(own):
                raise Unsupported(
                    f"vla-cache compares the patches of a square grid, and camera {number} has {len(own)} tokens; "
                    "vla-pruner takes any"
                )
            similarity[own] = patch_similarity(pictures[number], frame.pictures[number], side).to(similarity)
            static.append(own[still(similarity[own], method.threshold, round(method.static * len(own)))])
        relevant = looked_at(frame.attention, round(method.relevant * len(frame.camera)))
        rest = reusable(torch.cat(static), relevant)
        rest = rest[similarity[rest].argsort(descending=True, stable=True)]
        shares = reuse_shares(frame.entropy, method.growth).cummax(dim=0).values
        first = torch.full_like(frame.camera, layers)
        for number in reversed(range(layers)):
            first[rest[: int(shares[number] * len(rest))]] = number
        return first

    def before(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hands a layer the tokens that work, and a cache that knows the others' keys and values."""
        state = _reading.get()
        if state is None:
            return None
        resting = state.rest_from <= number
        if not bool(resting.any()):
            return None
        hidden, split = args[0], Split.of(resting)
        state.splits[number], state.rest = split, gather(hidden, split.rest)
        mask = rows_of_mask(kwargs.get("attention_mask"), split.text, 0, hidden.shape[1])
        given = {
            **kwargs,
            **{
                name: taken(kwargs.get(name), split.text, dimension)
                for name, dimension in (("position_ids", -1), ("position_embeddings", -2))
            },
            "attention_mask": mask,
            "past_key_values": Joining(kwargs.get("past_key_values"), split, self._kept(state, number, split)),
        }
        asking_rows.set(functools.partial(all_rows, split))
        return (gather(hidden, split.text),), given

    def _kept(self, state: Reading, number: int, split: Split) -> Pair:
        """Keys and values, of the step before, of the tokens that rest."""
        ranks = state.visual.cumsum(dim=-1) - 1
        rows: list[Pair] = []
        for row, (frame, places) in enumerate(zip(state.frames, split.rest, strict=True)):
            index = ranks[row, places.clamp(min=0)].clamp(min=0)
            source = frame or next(one for one in state.frames if one is not None)  # a row of padding alone: never read
            index = index.clamp(max=len(source.positions) - 1)
            rows.append((source.pairs[number][0][:, index], source.pairs[number][1][:, index]))
        keys, values = zip(*rows, strict=True)
        return torch.stack(keys), torch.stack(values)

    def after(self, number: int, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Puts the tokens at rest back; nothing reads them any more."""
        asking_rows.set(None)
        state = _reading.get()
        if state is None or state.rest is None or output is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        hidden, state.rest = state.splits[number].joined(hidden, state.rest, 1), None
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _reader(self, number: int, begins: bool) -> Any:
        """In one layer, what the words look at; where an episode begins, every layer's entropy: [batch, 1 + tokens]."""

        def read(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
            state = _reading.get()
            assert state is not None
            works = state.real & (state.rest_from > number)
            causal = not sees_the_future(mask, query.shape[2])
            view = LayerView(query, key, scaling, mask, state.visual, works, None, causal)
            entropy, words = torch.zeros(len(query), device=query.device), torch.zeros(works.shape, device=query.device)
            if begins:
                for _, rows in view.blocks():
                    entropy += torch.special.entr(rows.mean(dim=1)).sum(dim=(-1, -2))
            if number == self.words_in:
                order = words_behind(state.visual, state.real)
                asked = (order >= 0).sum(dim=-1, keepdim=True).clamp(min=1)
                words = view.rows(order).mean(dim=1).sum(dim=1) / asked
            return torch.cat([(entropy / works.sum(dim=-1))[:, None], words], dim=-1)

        return read

    def _stop(self) -> Reading | None:
        state = _reading.get()
        _reading.set(None)
        if state is not None:
            state.recorded[0].__exit__(None, None, None)
        return state

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Remembers the step for the next, and says in the report what rested."""
        state = self._stop()
        cache = getattr(output, "past_key_values", None)
        if state is None or cache is None:
            return
        found = [reads[0] for reads in state.recorded[1].values()]
        words = found[self.words_in if len(found) > 1 else 0]
        for row, (number, before) in enumerate(zip(state.call.rows, state.frames, strict=True)):
            places = state.visual[row].nonzero().flatten()
            self.frames[number] = Frame(
                position_of(places, state.real[row]),
                tuple(own[row] for own in state.call.images),
                state.camera[row, places],
                words[row, 1:][places],
                torch.stack([one[row, 0] for one in found]) if before is None else before.entropy,
                [(layer.keys[row][:, places], layer.values[row][:, places]) for layer in cache.layers],
            )
        self._report(state)

    def _report(self, state: Reading) -> None:
        report, layers = self.attachment.current_report(), len(self.layers)
        if report is None:
            return
        works = state.rest_from.clamp(max=layers)[state.visual]
        report.record(
            "visual_tokens", float(works.sum()) / layers, int(state.visual.sum()), "tokens computed, mean over layers"
        )
        resting = (state.rest_from < layers) & state.visual
        report.facts["reused"] = [
            {"row": row, "first_step": frame is None, "tokens": int(own.sum())}
            for row, frame, own in zip(state.call.rows, state.frames, resting, strict=True)
        ]


class PrefixReuser(Prefixed, Reuser):
    """The same in front of pi0's expert."""


def words_behind(
    visual: Bool[Tensor, "batch tokens"], real: Bool[Tensor, "batch tokens"]
) -> Int[Tensor, "batch words"]:
    """The places of the words behind the last picture; rows with fewer are filled up with -1."""
    behind = ~visual & real & (visual.cumsum(dim=-1) == visual.sum(dim=-1, keepdim=True))
    width = int(behind.sum(dim=-1).max())
    order = behind.int().argsort(dim=-1, descending=True, stable=True)[:, :width]
    return torch.where(behind.gather(1, order), order, -1)


def position_of(places: Int[Tensor, " visual"], real: Bool[Tensor, " tokens"]) -> Int[Tensor, " visual"]:
    """The positions of tokens, counted without padding."""
    return real.cumsum(dim=-1)[places] - 1


def attach(method: VLACache, target: Any, attachment: Attachment) -> None:
    """Decorates a policy's model.  Raises `Unsupported` for anything else."""
    if not isinstance(target, Policy):
        raise Unsupported(
            f"vla-cache compares a policy's pictures from step to step; got {type(target).__name__}. Put PI0Policy or "
            "ActionTokenPolicy around it"
        )
    host = find_host(target.model)
    if is_pi0(target.model):
        mechanism = PrefixReuser(method, host, attachment)
        mechanism.attach()
        mechanism.note(target.model)
    else:
        Reuser(method, host, attachment).attach()
