"""The command `mmaccel generate`.

torch and diffusers are imported when it runs, not here: `mmaccel --help` reads this file.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmaccel.console import show, table, working

if TYPE_CHECKING:
    from diffusion.search import Search

DEFAULT_MODEL = "pocket-flow"
DEFAULT_METHOD = "rollover-budget-forcing"
DEFAULT_REWARD = "clip-score"
SHOWN = 12  # finalists on the sheet


def generate(
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What to draw; autoregressive models: classes, with commas between.")
    ],
    model: Annotated[
        str,
        typer.Option(metavar="MODEL", help="The folder of a pipeline or an autoregressive model, or a pocket model."),
    ] = DEFAULT_MODEL,
    method: Annotated[
        str, typer.Option(metavar="METHOD", help="A search or a speculation, as `mmaccel methods` lists them.")
    ] = "",
    reward: Annotated[str, typer.Option(metavar="REWARD", help="A name, or package.module:function.")] = DEFAULT_REWARD,
    nfe: Annotated[int | None, typer.Option(metavar="ROWS", help="Most denoiser rows of the search.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="The pipeline's number of steps.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of everything.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the method.")
    ] = None,
    call: Annotated[
        list[str] | None, typer.Option("--call", metavar="NAME=VALUE", help="An argument of the pipeline's call.")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the files go.")] = Path("generated"),
) -> None:
    """Draw a picture or a video with a search, and report what the search spent and found.

    Ctrl-C ends the search; the best sample so far is kept.  An autoregressive model draws a picture of each class with
    drafts; there Ctrl-C ends the command after the picture that it is at.
    """
    with working("loading") as status:
        from diffusion.autoregressive.generating import is_autoregressive

        if is_autoregressive(model):
            status.stop()
            _check_searchless(model, reward, nfe, steps)
            _paint(model, prompt, method, settings or [], _call_arguments(model, call or [], None), seed, output)
            return
        import torch

        import mmaccel
        from diffusion.loading import load
        from diffusion.pipelines import stop

        search = _search(method or DEFAULT_METHOD, reward, nfe, settings or [])
        output.mkdir(parents=True, exist_ok=True)
        pipeline, _ = load(model)
        arguments = _call_arguments(model, call or [], steps)
        status.stop()
        mmaccel.apply(pipeline, search)
        with _interrupted_by(lambda: stop(pipeline), "the best sample so far is kept"):
            found = pipeline(
                prompt, generator=torch.Generator().manual_seed(seed), **{**arguments, "output_type": "pt"}
            )
    report = mmaccel.report(pipeline)
    typer.echo(str(report))
    for file in _write(output, torch.as_tensor(found[0])[0], report, prompt):
        typer.echo(str(file))


def _check_searchless(model: str, reward: str, nfe: int | None, steps: int | None) -> None:
    """Raises ValueError for options that only searches of pipelines have."""
    given = {"--reward": reward != DEFAULT_REWARD, "--nfe": nfe is not None, "--steps": steps is not None}
    for name, asked in given.items():
        if asked:
            raise ValueError(
                f"{name} is for searches of diffusers pipelines, and {model} draws token after token; leave it away. "
                "Settings of its method are given by --set, e.g. --set length=8, of its generate by --call"
            )


def _paint(
    model: str, prompt: str, method: str, settings: Sequence[str], call: Mapping[str, Any], seed: int, output: Path
) -> None:
    from threading import Event

    from diffusion.autoregressive import generating

    output.mkdir(parents=True, exist_ok=True)
    halt = Event()
    with working(f"drawing {prompt}"), _interrupted_by(halt.set, "the pictures so far are kept, and that in progress"):
        generating.generate(model, prompt, method, settings, call, seed, output, halt.is_set)


def _search(name: str, reward: str, nfe: int | None, settings: Sequence[str]) -> Search:
    from diffusion.search import Search
    from mmaccel.methods import get_method
    from mmaccel.recipes import method_from_settings

    known = get_method(name)
    if not issubclass(known, Search):
        raise ValueError(f"{name} is no search of a diffusers pipeline; see `mmaccel methods`, stage denoise")
    given: dict[str, Any] = {"reward": reward, "pictures": SHOWN}
    if nfe is not None:
        if "nfe" not in known.json_schema()["properties"]:
            raise ValueError(
                f"{name} has no setting nfe: what it spends follows from its settings; leave --nfe away and set these "
                f"with --set: {', '.join(known.json_schema()['properties'])}"
            )
        given["nfe"] = nfe
    search = method_from_settings(name, settings, **given)
    assert isinstance(search, Search)
    return search


def _call_arguments(model: str, given: Sequence[str], steps: int | None) -> dict[str, Any]:
    import yaml

    from mmaccel import pocket
    from mmaccel.recipes import name_and_value

    arguments: dict[str, Any] = dict(pocket.call_defaults(model)) if model in pocket.names() else {}
    for pair in given:
        name, value = name_and_value(pair, "an argument of the call", "guidance_scale=3")
        arguments[name] = yaml.safe_load(value)
    return arguments if steps is None else {**arguments, "num_inference_steps": steps}


@contextmanager
def _interrupted_by(stop: Any, kept: str) -> Iterator[None]:
    """Ctrl-C calls `stop` once and says what is kept; a second one interrupts as ever."""
    before = signal.getsignal(signal.SIGINT)

    def once(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        typer.echo(f"stopping: {kept}", err=True)
        stop()

    signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _write(folder: Path, sample: Any, report: Any, prompt: str) -> list[Path]:
    """The sample, the sheet of finalists, the reward's curve and the report, as files in a folder."""
    from diffusion.pictures import save, sheet

    data = report.to_dict()
    files = [save(sample, folder / "best")]
    listing = table("finalist", "reward", "seed", title=prompt)
    shown: Sequence[Mapping[str, Any]] = data["finalists"][:SHOWN]
    for number, finalist in enumerate(shown, 1):
        listing.add_row(str(number), f"{finalist['reward']:.4f}", str(finalist["seed"]))
    show(listing)
    if pictures := report.details.get("pictures"):
        captions = [f"{number}: {finalist['reward']:.4f}" for number, finalist in enumerate(shown, 1)]
        files.append(folder / "finalists.png")
        sheet(pictures[0], captions).save(files[-1])
    files.append(folder / "report.json")
    files[-1].write_text(json.dumps(data, indent=2) + "\n")
    try:
        from mmaccel.plots import curves

        points = [(float(rows), float(reward)) for rows, reward in data["reward_trace"]]
        curve = folder / "reward.png"
        curves({"best so far": points}, curve, title=prompt, x="denoiser rows (NFE)", y="reward", steps=True)
        files.append(curve)
    except ImportError as missing:
        typer.echo(f"no curve was drawn: {missing}", err=True)
    return files
