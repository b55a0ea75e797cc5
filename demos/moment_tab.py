"""The tab *Find the moment*."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from demos.components import Desk, begins_and_ends, drawing, live, markdown_table, refusing, run_and_stop, told
from demos.serving import between, example_file, one_of, short_text
from demos.uploads import checked_video
from mmaccel.registry import entries, find_class

if TYPE_CHECKING:
    from demos.moments import Moments

SEARCH, DETECTOR = "tstar", "colour-shape"
TARGET = "blue square"
SEARCHES, DETECTORS = "keyframe_searches", "detectors"


def moment_tab(desk: Desk, page: gr.Blocks) -> None:
    """Draws the tab and says what its buttons do."""
    gr.Markdown("A keyframe search finds the few frames of a video that show what you name; click one to jump there.")
    with gr.Row():
        with gr.Column():
            film = gr.Video(
                str(example_file("film.mp4")), label="Video", sources=["upload"], height=300, buttons=[],
                elem_id="moment-film",
            )  # fmt: skip
        with gr.Column():
            find = gr.Textbox(TARGET, label="Look for (commas between)", max_length=500, elem_id="moment-find")
            near = gr.Textbox(label="Seen near it, if anything", max_length=500)
            with gr.Row():
                search = gr.Dropdown([SEARCH], value=SEARCH, label="Search", filterable=False, min_width=200)
                detector = gr.Dropdown([DETECTOR], value=DETECTOR, label="Detector", filterable=False, min_width=200)
            frames = gr.Slider(1, 16, 4, step=1, label="Frames to find")
            budget = gr.Slider(0.05, 1.0, 0.5, step=0.05, label="Budget: the share of the seconds to look at")
            run, stop = run_and_stop("Find", "moment")
    figures = gr.Markdown(elem_id="moment-figures")
    sheet = gr.Gallery(
        label="Contact sheet: choose a frame to jump there", interactive=False, columns=4, format="png",
        allow_preview=False, height="auto", buttons=[], elem_id="moment-sheet", elem_classes="drawing",
    )  # fmt: skip
    with gr.Row():
        curve = drawing("Relevance over time", "moment-curve")
        seen = drawing("Looked at last", "moment-seen")
    times = gr.State(())

    @told
    def look(
        request: gr.Request, file: Any, find: Any, near: Any, by: Any, eye: Any, count: Any, share: Any
    ) -> Iterator[Any]:
        path = checked_video(file)
        from demos.moments import find_live

        targets, cues = phrases(short_text(find, "what to look for")), phrases(str(near or "")[:500])
        by, eye = one_of(by, simple(SEARCHES), "search"), one_of(eye, simple(DETECTORS), "detector")
        number, part = between(count, 1, 16, "the number of frames"), between(round(share * 100), 1, 100, "the budget")
        work = partial(find_live, path, by, eye, targets, cues, number, part / 100)
        yield from live(desk, request, work, ("", (), None, None, ()), outputs)

    def offered() -> list[Any]:
        chosen = (SEARCHES, SEARCH), (DETECTORS, DETECTOR)
        return [gr.Dropdown(choices=simple(kind), value=first) for kind, first in chosen]

    film.upload(refusing(checked_video), film, film, concurrency_id="uploads", show_progress="hidden")
    given = [film, find, near, search, detector, frames, budget]
    begins_and_ends(desk, [run.click], stop, look, given, [figures, sheet, curve, seen, times])
    sheet.select(jump, times, film, queue=False, show_progress="hidden")
    page.load(offered, None, [search, detector], show_progress="hidden")


@cache
def simple(kind: str) -> list[str]:
    """Those that are installed under `mmaccel.KIND` and need no settings."""
    from mmaccel.named import Named
    from video.detectors import Detector
    from video.search import FrameSearch

    base: type[Named] = FrameSearch if kind == SEARCHES else Detector
    found = []
    for name in sorted(entries(f"mmaccel.{kind}")):
        try:
            find_class(f"mmaccel.{kind}", name, base).from_dict({})
        except ValueError:
            continue
        found.append(name)
    return found


def outputs(state: Moments) -> Sequence[Any]:
    """Figures, pictures, and the times that the contact sheet jumps to."""
    return markdown_table(("", "so far"), state.figures), state.sheet, state.curve, state.seen, state.times


def jump(moments: Any, chosen: gr.SelectData) -> Any:
    """The film at the frame that was chosen."""
    at = chosen.index
    there = bool(moments) and isinstance(at, int) and at < len(moments)
    return gr.Video(playback_position=moments[at]) if there else gr.skip()


def phrases(text: str) -> Sequence[str]:
    """What a line names, between commas."""
    return [phrase for part in text.split(",") if (phrase := part.strip())]
