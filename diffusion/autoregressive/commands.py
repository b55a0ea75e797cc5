"""Commands about autoregressive image models.  Heavy libraries are imported when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmaccel.console import working


def convert(
    kind: Annotated[str, typer.Argument(help="The kind of model: mar.")],
    file: Annotated[Path, typer.Argument(help="The published .pth file.")],
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint goes.")],
) -> None:
    """Turn published weights into a checkpoint in safetensors.  Of the file only tensors are read; no code is run."""
    if kind != "mar":
        raise ValueError(f"mar is the only kind of model that is converted; got {kind!r}")
    with working(f"converting {file}"):
        from diffusion.autoregressive.convert import convert_mar

        model = convert_mar(file, folder)
    typer.echo(f"{folder}: {model.num_parameters() / 1e6:.0f} M parameters, {model.config.tokens} tokens a picture")
