"""The tab *Speculative painting*."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from demos.components import Desk, begins_and_ends, drawing, live, markdown_table, model_choice, run_and_stop, told
from demos.serving import between
from demos.shelf import kind_of

if TYPE_CHECKING:
    from demos.painting import Painted

LACKING = (
    "**No model that draws token after token is installed.** `mmaccel pocket train pocket-mar` trains the pocket one; "
    "`mmaccel app --models FOLDER` offers yours, with its draft in the folder `draft`."
)


def painting_tab(desk: Desk, page: gr.Blocks) -> None:
    """Draws the tab and says what its buttons do."""
    gr.Markdown(
        "An autoregressive model draws a picture token after token. A small one drafts some of them, and the large one "
        "keeps those that it could have drawn itself: the same distribution, with fewer calls of its head."
    )
    lacking = gr.Markdown(elem_id="painting-lacking")
    with gr.Row():
        with gr.Column():
            model = gr.Dropdown([], label="Model", allow_custom_value=True)
            label = gr.Number(0, label="Class", precision=0, minimum=0)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        with gr.Column():
            length = gr.Slider(1, 16, 1, step=1, label="Drafts a round")
            guidance = gr.Slider(1.0, 5.0, 2.0, step=0.5, label="Guidance")
            run, stop = run_and_stop("Paint", "painting")
    figures = gr.Markdown(elem_id="painting-figures")
    with gr.Row():
        kinds = {"plain": "By the model alone", "speculative": "With drafts", "origins": "Where its tokens come from"}
        drawings = [drawing(words, f"painting-{kind}") for kind, words in kinds.items()]
    legend = gr.Markdown()

    @told
    def paint(request: gr.Request, name: Any, which: Any, start: Any, drafts: Any, guide: Any) -> Iterator[Any]:
        from demos.painting import LEGEND, paint_twice
        from diffusion.autoregressive.painters import load_painter

        if not name:
            raise ValueError(LACKING.replace("*", ""))
        chosen, seeded = between(which, 0, 10**6, "the class"), between(start, 0, 2**31, "the seed")
        number, tenths = (
            between(drafts, 1, 16, "the number of drafts"),
            between(round(guide * 10), 10, 50, "ten times the guidance"),
        )
        painter = desk.shelf.twin(str(name), load_painter)

        def outputs(state: Painted) -> Sequence[Any]:
            shown = state.progress or markdown_table(("", "by the model alone", "with drafts"), state.figures)
            return shown, state.plain, state.speculative, state.origins, LEGEND

        work = partial(paint_twice, painter, chosen, number, tenths / 10, seeded)
        yield from live(desk, request, work, ("", None, None, None, LEGEND), outputs)

    def offered() -> list[Any]:
        names = desk.shelf.names(lambda folder: kind_of(folder) == "mar")
        return [model_choice(names, "pocket-mar"), "" if names else LACKING]

    given = [model, label, seed, length, guidance]
    begins_and_ends(desk, [run.click], stop, paint, given, [figures, *drawings, legend])
    page.load(offered, None, [model, lacking], show_progress="hidden")
