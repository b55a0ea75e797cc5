"""The command `mmaccel keyframes`.

The room is imported when it runs, not here: `mmaccel --help` reads this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmaccel.console import show, table, working


def keyframes(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A video.")],
    find: Annotated[list[str], typer.Option("--find", metavar="PHRASE", help="What to find; may be repeated.")],
    near: Annotated[
        list[str] | None, typer.Option("--near", metavar="PHRASE", help="What is seen near it; may be repeated.")
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="How many frames.")] = 8,
    search: Annotated[
        str, typer.Option(metavar="NAME", help="tstar, dense-retrieval, aks, bolt or uniform.")
    ] = "tstar",
    detector: Annotated[
        str, typer.Option(metavar="NAME", help="colour-shape, pocket-detector, clip-similarity, or module:function.")
    ] = "colour-shape",
    model: Annotated[str | None, typer.Option(metavar="FOLDER", help="A checkpoint for the detector.")] = None,
    budget: Annotated[
        float, typer.Option(metavar="SHARE", help="Most seconds looked at: a share, or a whole number from 2 up.")
    ] = 0.5,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the files go.")] = Path("keyframes"),
) -> None:
    """Find the frames of a video that show something, and say when; writes a contact sheet and the score over time."""
    with working("looking"):
        import json

        from video.film import Film
        from video.finding import find_keyframes
        from video.sheets import clock, contact_sheet, score_curve

        with Film(file) as film:
            found = find_keyframes(
                film, search, _detector(detector, model), find, near or (), frames=frames, budget=_budget(budget)
            )
            decoded = film.reader.decoded
        output.mkdir(parents=True, exist_ok=True)
        contact_sheet(found).save(output / "keyframes.png")
        drawn = _drawn(score_curve, found, output / "scores.png", ", ".join(find))
    listing = table("time", "second", "score")
    for time, score in zip(found.times, found.scores, strict=True):
        listing.add_row(clock(time), f"{time:.2f}", "" if score != score else f"{score:.3f}")
    show(listing)
    for phrase, second in found.verified.items():
        typer.echo(f"verified: {phrase} at {clock(second)}")
    for note in found.notes:
        typer.echo(f"note: {note}")
    spent = found.ledger.spent
    typer.echo(
        f"looked at {spent.get('frames', 0)} frames in {spent.get('detector_calls', 0)} detector calls, of "
        f"{len(found.seconds)} seconds; decoded {decoded} frames"
    )
    (output / "keyframes.json").write_text(json.dumps({"file": str(file), **found.facts}, indent=2) + "\n")
    for path in (output / "keyframes.png", output / "keyframes.json", *drawn):
        typer.echo(str(path))


def _detector(name: str, model: str | None) -> Any:
    if model is None:
        return name
    return {"detector": "checkpoint" if name == "colour-shape" else name, "model": model}


def _budget(given: float) -> float | int:
    return int(given) if given > 1 and given == int(given) else given


def _drawn(draw: Any, found: Any, path: Path, title: str) -> list[Path]:
    """The curve's file; none, and a word of why, where it cannot be drawn."""
    try:
        draw(found, path, title)
    except (ImportError, ValueError) as missing:
        typer.echo(f"no curve was drawn: {missing}", err=True)
        return []
    return [path]
