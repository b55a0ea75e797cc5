"""The page: its tabs, its look, and how it is served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from demos.ask_tab import ask_tab
from demos.components import Desk, session_of
from demos.moment_tab import moment_tab
from demos.painting_tab import painting_tab
from demos.robot_tab import robot_tab
from demos.search_tab import search_tab
from demos.serving import Limits, Runs
from demos.shelf import Shelf

FONTS = ["system-ui", "sans-serif"]
CSS = """
.settings textarea { font-family: ui-monospace, monospace; }
.drawing .image-container, .drawing .grid-wrap { padding-top: 2.2rem; }
.prose table :is(td, th) { padding: 0.3rem 0.5rem; overflow-wrap: normal; word-break: normal; }
.drawing .grid-container { grid: auto-flow auto / repeat(auto-fill, minmax(8rem, 1fr)) !important; }
.drawing .grid-wrap { min-height: 0 !important; max-height: none !important; }
.drawing .thumbnail-lg { aspect-ratio: auto; height: auto; }
.drawing .thumbnail-lg > img { height: auto; aspect-ratio: auto; }
.drawing .caption-label { position: static; max-width: 100%; white-space: normal; border: 0; }
"""
TITLE = "mmaccel"
TABS = {
    "Ask a picture": ask_tab,
    "Search an image": search_tab,
    "Find the moment": moment_tab,
    "Speculative painting": painting_tab,
    "Robot": robot_tab,
}
AN_HOUR = 3600


def build(desk: Desk) -> Any:
    """The page as Gradio's blocks; nothing is loaded yet."""
    with gr.Blocks(title=TITLE, delete_cache=(AN_HOUR // 4, AN_HOUR), analytics_enabled=False) as page:
        gr.Markdown("# mmaccel\nMultimodal and generative models, faster and better at inference time.")
        for name, tab in TABS.items():
            with gr.Tab(name):
                tab(desk, page)

        def leave(request: gr.Request) -> None:
            desk.runs.leave(session_of(request))

        page.unload(leave)
    return page


def serve(host: str, port: int, folders: Sequence[Path], limits: Limits) -> None:
    """Serves the page until it is interrupted."""
    desk = Desk(Shelf(folders), Runs(limits.seconds), limits)
    page = build(desk)
    page.queue(max_size=limits.waiting, default_concurrency_limit=limits.working, api_open=False)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port or None,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=limits.upload,
        max_threads=8,
        footer_links=[],
        theme=gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        ssr_mode=False,
        run_history=False,
    )
    print(f"mmaccel app: {address}", flush=True)
    try:
        page.block_thread()
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)
