"""The tab *Search an image*."""

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
    run_and_stop,
    told,
)
from demos.forms import Form, methods_of
from demos.serving import between, one_of, short_text
from demos.shelf import kind_of
from mmaccel import pocket
from mmaccel.registry import entries

if TYPE_CHECKING:
    from demos.searching import Searched

FIRST_REWARD = "clip-score"
PROMPT = "four red squares"


def search_tab(desk: Desk, page: gr.Blocks) -> None:
    """Draws the tab and says what its buttons do."""
    gr.Markdown(
        "A search spends a pipeline's evaluations on choosing, by a reward, the picture or video that it returns."
    )
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="Prompt", value=PROMPT, max_length=500, elem_id="search-prompt")
            reward = gr.Dropdown([FIRST_REWARD], value=FIRST_REWARD, label="Reward", filterable=False)
            steps = gr.Slider(1, 50, 10, step=1, label="Steps of the pipeline")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        with gr.Column():
            model = gr.Dropdown([], label="Pipeline", allow_custom_value=True)
            form = method_form(
                Form("nfe", held=("reward", "pictures", "rows_per_call")),
                "denoise", cache(lambda: methods_of("denoise")),
                minimum=20, maximum=2000, step=20, value=200, label="NFE: denoiser rows that may be spent",
                elem_id="search-nfe",
            )  # fmt: skip
            run, stop = run_and_stop("Search", "search", "Stop with the best so far")
    figures = gr.Markdown(elem_id="search-figures")
    with gr.Row():
        candidates = drawing("Scored last", "search-candidates")
        curve = drawing("Reward", "search-curve")
    with gr.Row():
        best = drawing("The best", "search-best")
        finalists = gr.Gallery(
            label="Finalists", interactive=False, columns=3, format="png", height="auto", buttons=["fullscreen"],
            elem_id="search-finalists", elem_classes="drawing",
        )  # fmt: skip

    @told
    def search(
        request: gr.Request, text: Any, by: Any, count: Any, start: Any, name: Any, *settings: Any
    ) -> Iterator[Any]:
        from demos.searching import search_live
        from diffusion.loading import load

        wanted, judge = short_text(text, "a prompt"), one_of(by, rewards(), "reward")
        number, seeded = between(count, 1, 50, "the number of steps"), between(start, 0, 2**31, "the seed")
        method = form.read(*settings, reward=judge)
        pipeline, _ = desk.shelf.twin(str(name), load)
        defaults = pocket.call_defaults(str(name)) if name in pocket.names() else {}
        arguments = {**defaults, "num_inference_steps": number}
        work = partial(search_live, pipeline, method, wanted, arguments, seeded)
        yield from live(desk, request, work, ("", None, None, None, ()), outputs)

    def offered() -> list[Any]:
        names = desk.shelf.names(lambda folder: kind_of(folder) == "pipeline")
        chosen = gr.Dropdown(choices=rewards(), value=FIRST_REWARD)
        return [model_choice(names, "pocket-flow"), chosen, *form.first("rollover-budget-forcing")]

    given = [prompt, reward, steps, seed, model, *form.fields]
    begins_and_ends(desk, [run.click], stop, search, given, [figures, candidates, curve, best, finalists])
    page.load(offered, None, [model, reward, *form.fields], show_progress="hidden")


def outputs(state: Searched) -> Sequence[Any]:
    """Figures and pictures."""
    rows = [*state.figures, *([("stopped", "with the best so far")] if state.stopped else [])]
    shown = markdown_table(("", "so far"), rows)
    return shown, state.candidates, state.curve, state.best, state.finalists


@cache
def rewards() -> list[str]:
    """The rewards that need no settings."""
    from diffusion.rewards import get_reward

    return [name for name in sorted(entries("mmaccel.rewards")) if not get_reward(name).json_schema().get("required")]
