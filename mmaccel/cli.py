"""The command line: `mmaccel`.

Nothing heavy is imported here: a command imports what it needs when it runs, so that `mmaccel --help` is quick.
Installed packages add commands through the entry-point group `mmaccel.commands` (a plain function, which typer reads),
loaders of models through `mmaccel.loaders` (by the stage that a method acts on first), benches through
`mmaccel.benches`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from mmaccel.console import complain, show, table, working
from mmaccel.methods import get_method, list_methods
from mmaccel.registry import entries, suggest

if TYPE_CHECKING:
    from mmaccel.methods import Method

USER_ERRORS = (ValueError, TypeError, OSError, ImportError)
"""What a wrong input raises; these end in one line and exit code 2, other failures of a run in exit code 1."""


class Commands(TyperGroup):
    """Our own commands and those of installed packages; errors become one red line."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return [*super().list_commands(ctx), *sorted(entries("mmaccel.commands"))]

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        entry = entries("mmaccel.commands").get(cmd_name)
        return _command(entry) if entry else super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            raise ValueError(f"there is no command {args[0]!r}; {suggest(args[0], known)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except (*USER_ERRORS, RuntimeError) as error:
            if ctx.find_root().params.get("traceback"):
                raise
            complain(error)
            raise typer.Exit(2 if isinstance(error, USER_ERRORS) else 1) from None


app = typer.Typer(
    cls=Commands,
    name="mmaccel",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
pocket = typer.Typer(no_args_is_help=True, help="The small models that come with mmaccel.")
app.add_typer(pocket, name="pocket")

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting, e.g. budget=0.3; may be repeated.")
]


@app.callback()
def start(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    """Multimodal and generative models, faster and better at inference time, without retraining."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say at length that torchvision is absent
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Plain data, with every setting's schema.")] = False,
) -> None:
    """List the installed methods, what they do, their settings with defaults, and their presets."""
    found = [describe(get_method(name)) for name in list_methods()]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    listing = table("method", "stages", "what it does", "settings")
    for method in found:
        settings = [f"{name}={setting.get('default', 'REQUIRED')}" for name, setting in method["settings"].items()]
        presets = [f"preset {name}" for name in method["presets"]]
        row = method["method"], ", ".join(method["stages"]), method["summary"], "\n".join(settings + presets)
        listing.add_row(*row)
    show(listing)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, or the name of a pocket model.")],
    method: Annotated[str, typer.Argument(help="A method, as `mmaccel methods` lists them.")],
    settings: Settings = None,
) -> None:
    """Test the laws that a method has to keep on your own model: exit code 0 if all hold, 1 if one does not."""
    from mmaccel.recipes import method_from_settings

    chosen = method_from_settings(method, settings or [])
    target, processor = loader_for(chosen)(model)

    from mmaccel.checks import check as check_laws

    with working(f"checking {method} on {model}"):
        report = check_laws(target, chosen, processor=processor)
    listing = table("law", "measured", "bar", "")
    for law in report.laws:
        verdict = "[green]holds[/]" if law.passed else "[bold red]BROKEN[/]"
        listing.add_row(str(law.law), _figure(law.measured), _figure(law.bar), verdict)
    show(listing)
    typer.echo(f"{method} on {model}: {'passed' if report.passed else 'FAILED'}")
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="A bench, e.g. vision-tokens.")],
    settings: Settings = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the figures here.")] = None,
) -> None:
    """Measure the methods, against the plain baselines and against the limit."""
    from mmaccel.bench import get_bench
    from mmaccel.recipes import name_and_value

    given = (name_and_value(setting, "a setting", "rounds=5") for setting in settings or [])
    chosen = get_bench(name).from_options(dict(given))
    for file in (json_file, plot_file):
        if file is not None and not file.absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder of {file} does not exist; make it first")
    with working(name) as status:
        result = chosen.run(lambda what, done, total: status.update(f"{name}: {what} ({done} of {total})"))
    if json_file is not None:
        result.save(json_file)
    listing = table("figure", "value")
    for figure_name, figure in result.figures.items():
        listing.add_row(figure_name, str(figure))
    show(listing)
    if plot_file is not None:
        chosen.plot(result, plot_file)


@pocket.command("list")
def pocket_list() -> None:
    """List the pocket models of this installation and their sizes."""
    from mmaccel.pocket import names, path, size

    listing = table("model", "size", "folder")
    for name in names():
        listing.add_row(name, f"{size(name) / 1e6:.1f} MB", str(path(name)))
    show(listing)


@pocket.command("path")
def pocket_path(name: Annotated[str, typer.Argument(help="As `mmaccel pocket list` lists them.")]) -> None:
    """Print the folder of a pocket model, for `from_pretrained`."""
    from mmaccel.pocket import path

    typer.echo(path(name))


@pocket.command("train")
def pocket_train(
    name: Annotated[str, typer.Argument(help="Which pocket model.")],
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, logs and the weights.")] = Path(
        "pocket-training"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each stage, in place of the recipe's.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from a checkpoint in the folder.")] = True,
) -> None:
    """Train a pocket model again, as the shipped one was; minutes to an hour on two cores."""
    from mmaccel.pocket.train import train, trainable

    if name not in trainable():
        raise ValueError(f"there is no training script for {name!r}; {suggest(name, trainable())}")
    typer.echo(train(name, output, steps=steps, resume=resume))


def describe(cls: type[Method]) -> dict[str, Any]:
    """A method as plain data: name, version, stages, summary, the JSON schema of each setting, and presets."""
    settings = cls.json_schema().get("properties", {})
    return {
        "method": cls.name,
        "version": cls.version,
        "stages": list(cls.stages),
        "summary": cls.summary(),
        "settings": settings,
        "presets": {name: dict(preset) for name, preset in cls.presets.items()},
    }


def loader_for(method: Method) -> Callable[[str], tuple[Any, Any]]:
    """The function that loads a (model, processor) for methods of this kind; found by the method's first stage."""
    loaders, stage = entries("mmaccel.loaders"), method.stages[0]
    if stage not in loaders:
        raise ValueError(
            f"no installed package can load a model for {method.name}, which acts on the stage {stage!r}; "
            f"loaders are known for: {', '.join(sorted(loaders)) or 'no stage'}. Use mmaccel.check in Python"
        )
    loader: Callable[[str], tuple[Any, Any]] = loaders[stage].load()
    return loader


def _command(entry: EntryPoint) -> Any:
    """A plain function of an installed package as a command; one that cannot be imported says so when it is run."""
    try:
        function = entry.load()
    except ImportError as error:
        problem = f"the command {entry.name!r} ({entry.value}) cannot be imported: {error}"

        def function() -> None:
            raise ImportError(problem)

        function.__doc__ = problem
    alone = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    alone.command(entry.name)(function)
    return typer.main.get_command(alone)


def _figure(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    """The entry point of the `mmaccel` command."""
    app()
