"""The tab *Ask a picture*."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from demos.components import (
    Desk,
    begins_and_ends,
    drawing,
    live,
    markdown_table,
    method_form,
    model_choice,
    picture_upload,
    run_and_stop,
    told,
)
from demos.forms import Form, methods_of
from demos.serving import between, short_text
from demos.shelf import kind_of
from demos.uploads import checked_picture
from mmaccel.pocket.pictures import pictures

if TYPE_CHECKING:
    from demos.asking import Asked

HEAD = ("", "as it is", "decorated", "ratio")
ALL_FIGURES = "visual tokens", "prefill FLOPs", "KV cache, bytes", "first token, ms", "tokens a second"
EMPTY = markdown_table(HEAD, [[name, "", "", ""] for name in ALL_FIGURES])


def ask_tab(desk: Desk, page: gr.Blocks) -> None:
    """Draws the tab and says what its buttons do."""
    gr.Markdown("The same question, asked of the model as it is and of the model that reads fewer visual tokens.")
    with gr.Row():
        with gr.Column():
            picture, question = prompt_fields()
        with gr.Column():
            model = gr.Dropdown([], label="Model", allow_custom_value=True)
            form = method_form(
                Form("budget"), "prefill", cache(lambda: methods_of("prefill")),
                minimum=0.05, maximum=1.0, step=0.05, value=0.25, label="Budget: the share that is kept",
                elem_id="ask-budget",
            )  # fmt: skip
            longest = gr.Slider(1, 256, 32, step=1, label="Longest answer, tokens")
            run, stop = run_and_stop("Ask", "ask")
    with gr.Row():
        sides = [field for number, name in enumerate(("As it is", "Decorated")) for field in side(number, name)]
    table = gr.Markdown(EMPTY, elem_id="ask-table", label="Figures")

    @told
    def ask(request: gr.Request, file: Any, text: Any, name: Any, most: Any, *settings: Any) -> Iterator[Any]:
        from demos.asking import ask_twice
        from vision_tokens.loading import load

        shown, asked = checked_picture(file), short_text(text, "a question")
        method, longest = form.read(*settings), between(most, 1, 256, "the longest answer")
        loaded, processor = desk.shelf.twin(str(name), load)
        work = partial(ask_twice, loaded, processor, shown, asked, [method], longest)
        yield from live(desk, request, work, ("", None, "", None, EMPTY), outputs)

    def offered() -> list[Any]:
        from vision_tokens.families import FAMILIES

        names = desk.shelf.names(lambda folder: kind_of(folder) in FAMILIES)
        return [model_choice(names, "pocket-llava"), *form.first("hired")]

    given = [picture, question, model, longest, *form.fields]
    begins_and_ends(desk, [run.click, question.submit], stop, ask, given, [*sides, table])
    page.load(offered, None, [model, *form.fields], show_progress="hidden")


def prompt_fields() -> tuple[Any, Any]:
    """Fields for a picture and a question, with the examples that come with the page."""
    shipped = pictures("pocket-llava")
    picture = picture_upload(str(shipped[0].file), "ask-picture")
    question = gr.Textbox(label="Question", value=shipped[0].questions[0][0], max_length=500, elem_id="ask-question")
    gr.Examples(
        [[str(one.file), text] for one in shipped for text, _ in one.questions[:1]],
        [picture, question],
        label="Examples",
        example_labels=[f"{one.file.stem}: {one.questions[0][0]}" for one in shipped],
    )
    return picture, question


def side(number: int, name: str) -> tuple[Any, Any]:
    """A column for one model's answer and what it reads of the picture."""
    with gr.Column():
        answer = gr.Textbox(label=f"{name}: answer", interactive=False, lines=2, elem_id=f"ask-answer-{number}")
        return answer, drawing(f"{name}: tokens that are read", f"ask-drawing-{number}")


def outputs(state: Asked) -> Sequence[Any]:
    """Answers and drawings of both sides, and the figures."""
    (dense, other), (before, after) = state.answers, state.drawings
    return dense, before, other, after, markdown_table(HEAD, state.table())
