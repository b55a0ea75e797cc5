"""The command `mmaccel app`.  Gradio is imported when it runs, and models when somebody asks for one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def app(
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets the network in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    models: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="A checkpoint, or a folder of some, to offer; may be repeated."),
    ] = None,
    upload_megabytes: Annotated[int, typer.Option(min=1, help="The largest file that may be uploaded.")] = 64,
    seconds: Annotated[int, typer.Option(min=1, help="The longest that one run may take.")] = 600,
) -> None:
    """Open the demos as a page for the browser; Ctrl-C ends it and deletes what was uploaded."""
    for folder in models or []:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r} of models to offer")
    from demos.serving import Limits, private_folder

    with private_folder():
        try:
            from demos.page import serve
        except ImportError as error:
            raise ImportError(
                f"the page needs Gradio, which cannot be imported ({error}); pip install 'mmaccel[demo]'"
            ) from None
        serve(host, port, models or [], Limits(upload_megabytes * 2**20, seconds))
