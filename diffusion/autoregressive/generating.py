"""What `mmaccel generate` does with an autoregressive image model: pictures of classes, and where tokens came from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import typer

import mmaccel
from diffusion.autoregressive.origins import SHOWN, coloured
from diffusion.autoregressive.painters import Painter, load_painter
from diffusion.pictures import save, sheet
from mmaccel import pocket
from mmaccel.checkpoints import find_folder
from mmaccel.console import show, table
from mmaccel.methods import Method
from mmaccel.recipes import method_from_settings
from mmaccel.reports import Report, figure

CALLS = ("target_backbone_calls", "target_head_calls", "passes")
COLUMNS = ("seed", "acceptance", "tokens_a_round", "tokens_a_pass", *CALLS, "seconds")


def is_autoregressive(model: str) -> bool:
    """Whether this is a single model, as autoregressive ones are, and no pipeline."""
    folder = pocket.path(model) if model in pocket.names() else Path(model)
    return (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()


def generate(
    model: str,
    prompt: str,
    method: str,
    settings: Sequence[str],
    call: Mapping[str, Any],
    seed: int,
    output: Path,
    stopped: Callable[[], bool],
) -> None:
    """Draws a picture of each class that the prompt names, one after the other, and writes what came of it.

    prompt: names or numbers of classes, with commas between.  stopped: asked after each picture.
    """
    painter = load_painter(find_folder(model))
    labels = [painter.label(part) for part in prompt.split(",")]
    speculation = chosen(painter, method, settings)
    pictures, reports = [], []
    for number, label in enumerate(labels):
        with mmaccel.applied(painter.model, speculation) as run:
            pictures.append(painter.shown(painter.draw([label], seed + number, **call)))
        reports.append(run.report)
        if stopped():
            break
    for file in write(output, torch.cat(pictures), reports, prompt.split(","), seed):
        typer.echo(str(file))


def chosen(painter: Painter, name: str, settings: Sequence[str]) -> Method:
    """The method of this name, else the one that suits the model, with these settings."""
    suits = painter.speculation
    given = {key: value for key, value in suits.to_dict().items() if key not in ("method", "version")}
    return method_from_settings(name or suits.name, settings, **(given if name in ("", suits.name) else {}))


def write(
    folder: Path, pictures: torch.Tensor, reports: Sequence[Report], names: Sequence[str], seed: int
) -> list[Path]:
    """The pictures, a sheet of them, a sheet of where their tokens come from, and the reports, as files."""
    drawn = [
        {"picture": name.strip(), "seed": seed + number, **counted(report)}
        for number, (name, report) in enumerate(zip(names, reports, strict=False))  # Ctrl-C leaves names over
    ]
    captions = [str(one["picture"]) for one in drawn]
    files = [save(picture, folder / f"picture-{number}") for number, picture in enumerate(pictures, 1)]
    columns = ["picture", *(name for name in COLUMNS if name in drawn[0])]
    listing = table(*(name.replace("_", " ") for name in columns))
    for one in drawn:
        listing.add_row(*(value if isinstance(value := one[name], str) else figure(value) for name in columns))
    show(listing)
    origins = [report.details["origins"] for report in reports if "origins" in report.details]
    sheets = {"pictures.png": pictures}
    if len(origins) == len(pictures):
        sheets["origins.png"] = coloured(torch.cat(origins), pictures)
        for words, colour in SHOWN.values():
            show(f"[{colour}]■[/] {words}")
    for name, shown in sheets.items():
        files.append(folder / name)
        sheet(shown, captions).save(files[-1])
    files.append(folder / "report.json")
    files[-1].write_text(json.dumps(drawn, indent=2) + "\n")
    return files


def counted(report: Report) -> dict[str, Any]:
    """The figures of a report that cost nothing to read: a speed-up would draw the picture again, without drafts."""
    ready = {name: item.value for name, item in report.quantities.items() if not callable(item.value)}
    return {"methods": list(report.methods), **ready, **report.facts}
