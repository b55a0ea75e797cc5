"""The tab *Robot*."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
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
    run_and_stop,
    told,
)
from demos.forms import Form, methods_of
from demos.serving import between

if TYPE_CHECKING:
    from demos.acting import Acted

EPISODES = 10_000
ACTION_WORD = '"move0"'  # of the policies that this tabletop knows


def robot_tab(desk: Desk, page: gr.Blocks) -> None:
    """Draws the tab and says what its buttons do."""
    gr.Markdown(
        "A policy pushes a disc onto a square. Bright patches are those that the last layer of its language model "
        "works on; `vla-pruner` begins to drop them at its fourth call."
    )
    with gr.Row():
        with gr.Column():
            model = gr.Dropdown([], label="Model", allow_custom_value=True)
            episode = gr.Number(3, label="Episode", precision=0, minimum=0)
            decorated = gr.Checkbox(True, label="Decorate the policy", elem_id="robot-decorated")
        with gr.Column():
            form = method_form(
                Form("budget"), "prefill", cache(lambda: methods_of("prefill")),
                minimum=0.05, maximum=1.0, step=0.05, value=0.8, label="Budget: the mean share over the layers",
                elem_id="robot-budget",
            )  # fmt: skip
            run, stop = run_and_stop("Act", "robot")
    figures = gr.Markdown(elem_id="robot-figures")
    seen = drawing("What the policy sees, and works on", "robot-seen")

    @told
    def act(request: gr.Request, name: Any, number: Any, decorate: Any, *settings: Any) -> Iterator[Any]:
        from demos.acting import act_live
        from robotics.pocket import as_policy
        from vision_tokens.loading import load

        methods = [form.read(*settings)] if decorate else []
        chosen = between(number, 0, EPISODES - 1, "the episode")
        policy = as_policy(*desk.shelf.twin(str(name), load))
        yield from live(desk, request, partial(act_live, policy, methods, chosen), ("", None), outputs)

    def offered() -> list[Any]:
        return [model_choice(desk.shelf.names(acts), "pocket-vla"), *form.first("vla-pruner")]

    begins_and_ends(desk, [run.click], stop, act, [model, episode, decorated, *form.fields], [figures, seen])
    page.load(offered, None, [model, *form.fields], show_progress="hidden")


def acts(folder: Path) -> bool:
    """Whether a checkpoint speaks the tabletop's actions."""
    words = folder / "tokenizer.json"
    return words.is_file() and ACTION_WORD in words.read_text()


def outputs(state: Acted) -> Sequence[Any]:
    """Figures and the picture."""
    return markdown_table(("", "so far"), state.figures), state.picture
