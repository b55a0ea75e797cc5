"""The command `mmaccel rollout`.

torch and transformers are imported when it runs, not here: `mmaccel --help` reads this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmaccel.console import working


def rollout(
    method: Annotated[list[str] | None, typer.Option(metavar="METHOD", help="A method; may be repeated.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting, e.g. kept_share=0.25.")
    ] = None,
    model: Annotated[str, typer.Option(metavar="MODEL", help="pocket-vla, or a folder of its kind.")] = "pocket-vla",
    seed: Annotated[int, typer.Option(min=0, help="Which held-out episode.")] = 0,
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where the video goes, an MP4.")] = Path("rollout.mp4"),
) -> None:
    """Let a policy push a disc onto a square, and film which patches of the picture it worked on."""
    from mmaccel.recipes import recipe_from_data

    if settings and not method:
        raise ValueError(
            f"--set {settings[0]} needs a method that has this setting; add --method, e.g. --method vla-pruner"
        )
    if output.suffix.lower() != ".mp4" or not output.absolute().parent.is_dir():
        raise ValueError(f"the video goes to an .mp4 file in a folder that exists; got --output {output}")
    methods = recipe_from_data([{"method": name} for name in method], settings or []) if method else []
    with working("playing"):
        from mmaccel.pocket.world import HELD_OUT_SEEDS
        from robotics.pocket import load
        from robotics.rollout import record

        played = record(load(model), output, HELD_OUT_SEEDS[seed], methods)
    ended = "done" if played.success else "not done"
    typer.echo(f"{played.instruction}: {ended} in {len(played.kept)} steps, {played.calls[-1]} calls; film: {output}")
