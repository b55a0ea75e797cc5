"""Where a policy's action tokens looked in earlier steps, and how that guides which visual tokens it works on next.

Rides on the decoder mechanism of `vision_tokens`: here is what lasts longer than a prompt.  An episode's memory is one
`Gaze` a row; the attention of action tokens is read, row by row, through whatever kernel the model runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from robotics.episodes import RowMemory, acting, forget_at_reset
from robotics.policies import Policy, cameras_of
from robotics.vla_pruner import VLAPruner
from vision_tokens.attention_rows import Recorded, listen, recording
from vision_tokens.families import Host, find_host
from vision_tokens.layer_columns import Run, current_run
from vision_tokens.layer_cutting import LayerCutter
from vision_tokens.layer_view import LayerView
from vision_tokens.looking_ahead import attention_of
from vision_tokens.prompts import padding_of, visual_places

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment

DENSE = ("warm-up", "refresh")
"""The kinds of steps that work on all tokens; those that drop some are "pruned"."""


@dataclass
class Gaze:
    """What is remembered of one row's episode.

    history: by step, the newest first, what each visual token was worth for acting.  step: how many have begun.
    since: steps that dropped tokens since one that did not.  places: of the visual tokens in the step's prompt.
    kept: which of them the step works on.  total, reads: what its action tokens attended to so far.
    """

    history: tuple[Float[Tensor, " visual"], ...] = ()
    step: int = 0
    since: int = 0
    kind: str = "warm-up"
    places: Tensor | None = None
    kept: Tensor | None = None
    total: Tensor | None = None
    reads: int = 0

    def begin(self, method: VLAPruner, places: Int[Tensor, " visual"]) -> None:
        """Puts the step before into the history, and decides whether this one drops tokens."""
        if self.total is not None and self.kept is not None:
            before = self.history[0] if self.history else None
            self.history = (method.remembered(self.total / self.reads, self.kept, before), *self.history)
            self.history = self.history[: method.window]
        warm = len(self.history) == method.window
        tired = method.refresh is not None and self.since >= method.refresh
        self.kind = "warm-up" if not warm else "refresh" if tired else "pruned"
        self.since = self.since + 1 if self.kind == "pruned" else 0
        self.step += 1
        self.places, self.kept = places, torch.ones_like(places, dtype=torch.bool)
        self.total, self.reads = None, 0

    def see(self, attention: Float[Tensor, " prompt"]) -> None:
        """Adds what one read of action tokens attended to."""
        seen = attention[self.places]
        self.total = seen if self.total is None else self.total + seen
        self.reads += 1


class Gazes(RowMemory[Gaze]):
    """The rows of a vectorised environment.  now: those of the step under way, in the order of the model's batch."""

    def __init__(self) -> None:
        super().__init__()
        self.now: tuple[int, ...] = ()
        self._batch: int | None = None

    def reset(self, rows: Any) -> None:
        """Forgets these rows."""
        super().reset(rows)
        self.now = ()
        if rows is None:
            self._batch = None

    def begin(self, method: VLAPruner, visual: Bool[Tensor, "batch tokens"]) -> list[Gaze]:
        """Begins a step of every row.

        Raises ValueError if rows or their visual tokens are others than the episode began with.
        """
        call, batch = acting(), len(visual)
        if call is None and self._batch not in (None, batch):
            raise ValueError(
                f"vla-pruner remembers episodes of {self._batch} rows, and this call has {batch}; before the number of "
                "environments changes, call robotics.reset(model)"
            )
        self._batch = batch if call is None else None
        self.now = tuple(range(batch)) if call is None else call.rows
        gazes = []
        for row, marks in zip(self.now, visual, strict=True):
            gaze, places = self[row] or Gaze(), marks.nonzero().flatten()
            if gaze.history and len(gaze.history[0]) != len(places):
                raise ValueError(
                    f"row {row} began its episode with {len(gaze.history[0])} visual tokens and now has {len(places)}, "
                    "so they cannot be told apart; show the same cameras at every step, or reset the row"
                )
            self[row] = gaze
            gaze.begin(method, places)
            gazes.append(gaze)
        return gazes


@dataclass
class Step:
    """A prompt that is being read: its rows, what the language model reads, and which camera each token shows."""

    gazes: list[Gaze]
    embeddings: Float[Tensor, "batch tokens width"]
    camera: Int[Tensor, "batch tokens"]


_step: ContextVar[Step | None] = ContextVar("step", default=None)
_reading: ContextVar[tuple[Run, ExitStack, Recorded] | None] = ContextVar("reading", default=None)


class GazeCutter(LayerCutter):
    """Cuts a prompt by what it attends to and by what earlier steps' action tokens attended to."""

    method: VLAPruner

    def __init__(self, method: VLAPruner, host: Host, attachment: Attachment, gazes: Gazes) -> None:
        super().__init__(method, host, attachment)
        self.gazes = gazes

    def shown(self) -> Bool[Tensor, "batch cameras"] | None:
        """Which cameras the rows of this call show, if somebody said so."""
        call = acting()
        return None if call is None else call.shown

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begins a step of every row with the forward that reads its prompt."""
        _step.set(None)
        visual = visual_places()
        if current_run() is not None and visual is not None and bool(visual.any()):
            given = {**dict(zip(self.text_names, args, strict=False)), **kwargs}
            camera = cameras_of(visual, self.shown())
            gazes = self.gazes.begin(self.method, visual)
            _step.set(Step(gazes, given["inputs_embeds"], camera))
        super().enter(module, args, kwargs)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Says in the report which steps drop tokens, and how many each camera kept."""
        step = _step.get()
        _step.set(None)
        super().leave(module, args, kwargs, output)
        report = self.attachment.current_report()
        if step is None or output is None or report is None:
            return
        report.facts["steps"] = []
        for row, gaze, camera in zip(self.gazes.now, step.gazes, step.camera, strict=True):
            kept = camera[gaze.places][gaze.kept].bincount(minlength=int(step.camera.max()) + 1).tolist()
            report.facts["steps"].append({"row": row, "step": gaze.step, "kind": gaze.kind, "kept": kept})
        report.record("dense_rows", sum(gaze.kind in DENSE for gaze in step.gazes), len(step.gazes), "rows")

    def cuts_that_bite(self, counts: set[int]) -> list[int]:
        """None if every row's step is dense."""
        step = _step.get()
        prunes = step is not None and any(gaze.kind == "pruned" for gaze in step.gazes)
        return super().cuts_that_bite(counts) if prunes else []

    def choose(
        self, hidden: Tensor, scores: Tensor, visual: Bool[Tensor, "batch tokens"], counts: list[int]
    ) -> tuple[Tensor, Bool[Tensor, "batch tokens"]]:
        """The method's choice with every row's guide; rows whose step is dense keep all."""
        step = _step.get()
        assert step is not None
        guide = torch.zeros_like(scores)
        for row, gaze in enumerate(step.gazes):
            if gaze.kind == "pruned":
                guide[row, gaze.places] = self.method.guide(gaze.history).to(guide)
            else:
                counts[row] = int(visual[row].sum())
        keep = self.method.select(scores, guide, step.embeddings, step.camera, counts)
        for gaze, own in zip(step.gazes, keep, strict=True):
            gaze.kept = own[gaze.places]
        return hidden, keep | ~visual


class ActionReader:
    """Reads what action tokens attend to, in some layers of the model that computes them.

    places: for a forward, the places of the action tokens among its new ones, [batch, actions]; None if it has none.
    """

    def __init__(
        self,
        gazes: Gazes,
        host: Host,
        layers: list[int],
        places: Callable[[Run, Mapping[str, Any]], Int[Tensor, "batch actions"] | None],
    ) -> None:
        self.gazes, self.host, self.places = gazes, host, places
        self.modules = {layer: attention_of(host.decoder_layers[layer]) for layer in layers}

    def attach(self, attachment: Attachment) -> None:
        """Registers the hooks; behind those of the layers' columns and of the cut."""
        listen(attachment, list(self.modules.values()))
        attachment.pre_hook(self.host.text, self.enter)
        attachment.hook(self.host.text, self.leave)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Listens to a forward that computes action tokens."""
        _reading.set(None)
        run = current_run()
        if run is None or not self.gazes.now or (places := self.places(run, kwargs)) is None:
            return
        undo = ExitStack()
        readers = dict.fromkeys(self.modules.values(), self._reader(run, places))
        _reading.set((run, undo, undo.enter_context(recording(readers))))

    def _reader(self, run: Run, places: Int[Tensor, "batch actions"]) -> Callable[..., Tensor]:
        def read(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
            everything, own = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device), places
            if run.index is not None:  # tokens went: the last is still there, at another place
                own = (run.index == places).int().argmax(dim=-1, keepdim=True)
            view = LayerView(query, key, scaling, mask, everything, everything)
            return view.rows_to_all(own).mean(dim=(1, 2))

        return read

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Adds what was read to the rows' gazes; a row may stand several times in the batch."""
        reading = _reading.get()
        _reading.set(None)
        if reading is None:
            return
        run, undo, recorded = reading
        undo.close()
        if output is None:
            return
        end = run.held + run.new
        attention = torch.zeros(run.batch, end + 1, device=run.device)
        for keys, reads in itertools.groupby(sorted(self._read(recorded), key=_width), key=_width):
            layers, rows = zip(*reads, strict=True)
            columns = run.columns(layers[0]).index[:, -keys:]
            attention.scatter_add_(1, columns.where(columns >= 0, end), torch.stack(rows).sum(dim=0) / len(recorded))
        now = [self.gazes[row] for row in self.gazes.now]
        for gaze, own in zip(now, attention[:, :-1].chunk(len(now)), strict=True):
            if gaze is not None:
                gaze.see(own.mean(dim=0))

    def _read(self, recorded: Recorded) -> list[tuple[int, Tensor]]:
        """By layer, what was read; those of one width have the same columns, since all lie behind the cut."""
        return [(layer, recorded[module][0]) for layer, module in self.modules.items()]


def _width(read: tuple[int, Tensor]) -> int:
    return read[1].shape[1]


def decoded_actions(run: Run, kwargs: Mapping[str, Any]) -> Int[Tensor, "batch actions"] | None:
    """For models that decode action tokens: the prompt's last token, and every one behind it."""
    everything = torch.arange(run.new, device=run.device).expand(run.batch, -1)
    if visual_places() is None:
        return everything if run.held else None
    real = padding_of(kwargs.get("attention_mask"), run.new)
    return everything[:, -1:] if real is None else (real * (everything + 1)).argmax(dim=-1, keepdim=True)


def attach(method: VLAPruner, target: Any, attachment: Attachment) -> None:
    """Decorates a policy's model, or a bare one.  Raises `Unsupported` for models that it does not know."""
    from robotics.flow import is_pi0
    from robotics.gaze_flow import attach_to_pi0

    model = target.model if isinstance(target, Policy) else target
    if is_pi0(model):
        attach_to_pi0(method, model, attachment)
        return
    host = find_host(model)
    if method.keeps_all:
        LayerCutter(method, host, attachment).attach(model)
        return
    gazes = Gazes()
    layers = list(method.action_layers(len(host.decoder_layers)))
    GazeCutter(method, host, attachment, gazes).attach(model)
    ActionReader(gazes, host, layers, decoded_actions).attach(attachment)
    forget_at_reset(attachment, gazes)
