"""The tab *Ask a picture*."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import gradio as gr

from demos.components import (
    Changes,
    Desk,
    drawing,
    markdown_table,
    method_form,
    model_choice,
    picture_upload,
    session_of,
    stops,
    told,
)
from demos.forms import Form, methods_of
from demos.serving import between, short_text, streamed
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
    shipped = pictures("pocket-llava")
    gr.Markdown("The same question, asked of the model as it is and of the model that reads fewer visual tokens.")
    with gr.Row():
        with gr.Column():
            picture = picture_upload(str(shipped[0].file), "ask-picture")
            question = gr.Textbox(
                label="Question", value=shipped[0].questions[0][0], max_length=500, elem_id="ask-question"
            )
            gr.Examples(
                [[str(one.file), text] for one in shipped for text, _ in one.questions[:1]],
                [picture, question],
                label="Examples",
                example_labels=[f"{one.file.stem}: {one.questions[0][0]}" for one in shipped],
            )
        with gr.Column():
            model = gr.Dropdown([], label="Model", allow_custom_value=True)
            form = method_form(
                Form("budget"), "prefill", cache(lambda: methods_of("prefill")),
                minimum=0.05, maximum=1.0, step=0.05, value=0.25, label="Budget: the share that is kept",
                elem_id="ask-budget",
            )  # fmt: skip
            longest = gr.Slider(1, 256, 32, step=1, label="Longest answer, tokens")
            with gr.Row():
                run, stop = (
                    gr.Button("Ask", variant="primary", elem_id="ask-run"),
                    gr.Button("Stop", elem_id="ask-stop"),
                )
    with gr.Row():
        sides = []
        for number, name in enumerate(("As it is", "Decorated")):
            with gr.Column():
                answer = gr.Textbox(label=f"{name}: answer", interactive=False, lines=2, elem_id=f"ask-answer-{number}")
                kept = drawing(f"{name}: tokens that are read", f"ask-drawing-{number}")
                sides += [answer, kept]
    table = gr.Markdown(EMPTY, elem_id="ask-table", label="Figures")

    @told
    def ask(request: gr.Request, file: Any, text: Any, name: Any, most: Any, *settings: Any) -> Iterator[Any]:
        from demos.asking import ask_twice
        from vision_tokens.loading import load

        shown, asked = checked_picture(file), short_text(text, "a question")
        method, longest = form.read(*settings), between(most, 1, 256, "the longest answer")
        loaded, processor = desk.shelf.twin(str(name), load)
        changed = Changes()
        yield changed("", None, "", None, EMPTY)
        with desk.runs.begin(session_of(request)) as halt:

            def work(show: Callable[[Asked], None]) -> None:
                ask_twice(loaded, processor, shown, asked, [method], longest, halt, show)

            for state in streamed(work):
                (dense, other), (before, after) = state.answers, state.drawings
                yield changed(dense, before, other, after, markdown_table(HEAD, state.table()))

    def offered() -> list[Any]:
        from vision_tokens.families import FAMILIES

        names = desk.shelf.names(lambda folder: kind_of(folder) in FAMILIES)
        return [model_choice(names, "pocket-llava"), *form.first("hired")]

    gr.on(
        [run.click, question.submit],
        ask,
        [picture, question, model, longest, *form.fields],
        [*sides, table],
        concurrency_id="work",
    )
    stops(stop, desk)
    page.load(offered, None, [model, *form.fields], show_progress="hidden")
