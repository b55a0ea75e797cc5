"""What several tabs are made of."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, TypeVar

import gradio as gr
from PIL import Image

from demos.forms import OWN, Form
from demos.serving import Limits, Runs, in_words, one_of, streamed
from demos.shelf import Shelf
from demos.uploads import checked_picture

State = TypeVar("State")


@dataclass(frozen=True)
class Desk:
    """What every tab works with."""

    shelf: Shelf
    runs: Runs
    limits: Limits


def told(handler: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A handler whose errors become messages on the page."""

    @functools.wraps(handler)
    def wrapped(*args: Any) -> Iterator[Any]:
        try:
            yield from handler(*args)
        except Exception as error:
            raise gr.Error(str(in_words(error)), print_exception=False) from None

    return wrapped


class Changes:
    """What a handler yields: of every output what is new, and nothing where it stays.

    Pictures get a mark of their own, so that Gradio, which names files by content, never writes one that is being read.
    """

    def __init__(self) -> None:
        self.before: tuple[Any, ...] = ()

    def __call__(self, *values: Any) -> list[Any]:
        before = self.before or (object(),) * len(values)
        self.before = values
        return [
            gr.skip() if new is old or new == old else _marked(new) for new, old in zip(values, before, strict=True)
        ]


def _marked(value: Any) -> Any:
    if isinstance(value, Image.Image):
        marked = value.copy()
        marked.info["mark"] = uuid.uuid4().hex
        return marked
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):  # a gallery
        return [(_marked(picture), caption) for picture, caption in value]
    return value or None


def session_of(request: gr.Request) -> str:
    """The session of the page that asks."""
    return str(request.session_hash)


def live(
    desk: Desk,
    request: gr.Request,
    work: Callable[[Event, Callable[[State], None]], None],
    empty: Sequence[Any],
    outputs: Callable[[State], Sequence[Any]],
) -> Iterator[Any]:
    """What a handler yields of a run: empty outputs, then those of every state that `work(stop, show)` shows."""
    changed = Changes()
    yield changed(*empty)
    with desk.runs.begin(session_of(request)) as stop:
        for state in streamed(functools.partial(work, stop)):
            yield changed(*outputs(state))


def run_and_stop(verb: str, tab: str, stop: str = "Stop") -> tuple[Any, Any]:
    """A row of the two buttons that begin and end a tab's runs."""
    with gr.Row():
        return gr.Button(verb, variant="primary", elem_id=f"{tab}-run"), gr.Button(stop, elem_id=f"{tab}-stop")


def begins_and_ends(
    desk: Desk, triggers: Sequence[Any], stop: Any, work: Callable[..., Iterator[Any]], given: Any, outputs: Any
) -> None:
    """Lets triggers begin runs of `work`, which wait for their turn, and a button end all of its page."""

    def wanted(request: gr.Request) -> None:
        desk.runs.ask(session_of(request))

    def ended(request: gr.Request) -> None:
        desk.runs.stop(session_of(request))

    asked = gr.on(triggers, wanted, queue=False, show_progress="hidden")
    asked.then(work, given, outputs, concurrency_id="work", trigger_mode="once")
    stop.click(ended, queue=False)


def model_choice(names: Sequence[str], wanted: str) -> Any:
    """The models that a tab offers, once they are known; the one that is wanted first, if it is there."""
    return gr.Dropdown(choices=list(names), value=wanted if wanted in names else next(iter(names), None))


def refusing(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A handler for uploads: what the check refuses is taken off the page, with a message."""

    def handler(file: Any) -> Any:
        try:
            check(file)
        except Exception as error:
            gr.Warning(str(in_words(error)))
            return None
        return gr.skip()

    return handler


def drawing(label: str, elem_id: str) -> Any:
    """A field that shows a picture."""
    return gr.Image(
        label=label, interactive=False, format="png", buttons=["fullscreen"], elem_id=elem_id, elem_classes="drawing"
    )


def picture_upload(example: str, elem_id: str) -> Any:
    """A field for a picture, which comes as a file's path; what is no picture is refused."""
    field = gr.Image(
        example,
        label="Picture",
        type="filepath",
        sources=["upload", "clipboard"],
        height=260,
        buttons=[],
        elem_id=elem_id,
    )
    field.preprocess = _path  # Gradio would open the file before anybody has checked it
    field.upload(refusing(checked_picture), field, field, concurrency_id="uploads", show_progress="hidden")
    return field


def _path(payload: Any) -> str | None:
    return None if payload is None else payload.path


@dataclass(frozen=True)
class MethodForm:
    """The fields that describe a method: itself, a preset, one slider and the other settings."""

    form: Form
    stage: str
    methods: Callable[[], list[str]]
    method: Any
    preset: Any
    knob: Any
    settings: Any

    @property
    def fields(self) -> list[Any]:
        """In the order that `read` takes them."""
        return [self.method, self.preset, self.knob, self.settings]

    def read(self, method: Any, preset: Any, knob: Any, settings: Any, **held: Any) -> Any:
        """The method that the fields describe.  Raises ValueError."""
        name = one_of(method, self.methods(), "method")
        chosen = one_of(preset, self.form.presets(name), "preset")
        return self.form.method(name, chosen, knob, settings or "", **held)

    def first(self, wanted: str) -> list[Any]:
        """What the fields show once the methods are known."""
        names = self.methods()
        name = wanted if wanted in names else names[0]
        return [gr.Dropdown(choices=names, value=name), *self._changed(name)]

    def _changed(self, method: Any) -> list[Any]:
        name = one_of(method, self.methods(), "method")
        presets = self.form.presets(name)
        return [gr.Dropdown(choices=presets, value=OWN, visible=len(presets) > 1), *self._started(name, OWN)]

    def _started(self, method: Any, preset: Any) -> list[Any]:
        name = one_of(method, self.methods(), "method")
        chosen = one_of(preset, self.form.presets(name), "preset")
        return [gr.Slider(visible=self.form.has_knob(name, chosen)), self.form.text(name, chosen)]

    def connect(self) -> None:
        """Lets the fields follow each other."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False}
        self.method.input(self._changed, self.method, [self.preset, self.knob, self.settings], **quiet)
        self.preset.input(self._started, [self.method, self.preset], [self.knob, self.settings], **quiet)


def method_form(form: Form, stage: str, methods: Callable[[], list[str]], **slider: Any) -> MethodForm:
    """Draws the fields; `first` fills them."""
    method = gr.Dropdown([], label="Method", filterable=False)
    preset = gr.Dropdown([OWN], value=OWN, label="Start from", visible=False, filterable=False)
    knob = gr.Slider(**slider)
    with gr.Accordion("All other settings", open=False):
        settings = gr.Textbox(
            label="A line a setting, as in a recipe", lines=4, max_lines=12, max_length=4000, elem_classes="settings"
        )
    made = MethodForm(form, stage, methods, method, preset, knob, settings)
    made.connect()
    return made


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
