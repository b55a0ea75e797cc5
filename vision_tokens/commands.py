"""The commands `mmaccel answer`, `mmaccel run`, `mmaccel calibrate` and `mmaccel demo`.

torch and transformers are imported when a command runs, not here: `mmaccel --help` reads this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmaccel.console import show, table, working

if TYPE_CHECKING:
    from mmaccel.methods import Method
    from mmaccel.reports import Report
    from vision_tokens.answering import Answer

IMAGE = typer.Option(metavar="FILE", help="A picture, PNG or JPEG.")
QUESTION = typer.Option(metavar="TEXT", help="A question about the picture.")
MODEL = typer.Option(metavar="MODEL", help="A checkpoint folder, or the name of a pocket model.")
SETTINGS = typer.Option("--set", metavar="NAME=VALUE", help="A setting, e.g. budget=0.3; may be repeated.")
LONGEST = typer.Option(min=1, metavar="TOKENS", help="Most tokens of an answer.")
DEFAULT_MODEL = "pocket-llava"
DEMO_MODELS = ("pocket-llava", "pocket-llava-next")
QUESTIONS_A_PICTURE = 2
COLUMNS = ("method", "answer", "visual\ntokens", "prefill\nFLOP", "KV\ncache", "first\ntoken", "tokens\n/s")
SHOWN = 32  # letters of an answer that table and drawing show


def answer(
    image: Annotated[Path, IMAGE],
    question: Annotated[str, QUESTION],
    model: Annotated[str, MODEL] = DEFAULT_MODEL,
    method: Annotated[list[str] | None, typer.Option(metavar="METHOD", help="A method; may be repeated.")] = None,
    settings: Annotated[list[str] | None, SETTINGS] = None,
    longest: Annotated[int, LONGEST] = 64,
) -> None:
    """Answer a question about a picture, and report what the methods did."""
    from mmaccel.recipes import recipe_from_data

    if settings and not method:
        raise ValueError(f"--set {settings[0]} needs a method that has this setting; add --method, e.g. --method hired")
    methods = recipe_from_data([{"method": name} for name in method], settings or []) if method else []
    _answer(model, image, question, methods, longest)


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A list of methods, as JSON or YAML.")],
    image: Annotated[Path, IMAGE],
    question: Annotated[str, QUESTION],
    model: Annotated[str, MODEL] = DEFAULT_MODEL,
    settings: Annotated[list[str] | None, SETTINGS] = None,
    longest: Annotated[int, LONGEST] = 64,
) -> None:
    """Apply a recipe to a model, answer a question about a picture, and report what the recipe did."""
    from mmaccel.recipes import load_recipe

    if not recipe.is_file():
        raise FileNotFoundError(f"there is no recipe {str(recipe)!r}; give a .json, .yaml or .yml file")
    _answer(model, image, question, load_recipe(recipe, settings or []), longest)


def calibrate(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, or the name of a pocket model.")],
    method: Annotated[str, typer.Argument(help="A method that is fitted to a model: prefix-kv or shortv.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where the recipe goes, JSON or YAML.")],
    image: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A picture; may be repeated.")] = None,
    question: Annotated[str, QUESTION] = "Describe this picture.",
    settings: Annotated[list[str] | None, SETTINGS] = None,
) -> None:
    """Fit a method to a model with some pictures (those that come with mmaccel, unless you give yours): a recipe."""
    from mmaccel.methods import Unsupported, get_method
    from mmaccel.recipes import method_from_settings, save_recipe

    fit = getattr(get_method(method), "calibrated", None)
    if fit is None:
        raise Unsupported(f"{method} takes its settings as they are; prefix-kv and shortv are fitted to a model")
    if output.suffix not in (".json", ".yaml", ".yml") or not output.absolute().parent.is_dir():
        raise ValueError(f"the recipe goes to a .json, .yaml or .yml file in a folder that exists; got {output}")
    names = {setting.partition("=")[0].removeprefix(f"{method}.") for setting in settings or []}
    given = method_from_settings(method, settings or []).to_dict()
    asked = [(file, question) for file in image] if image else [each[:2] for each in _questions(model, None, None)]
    with working("loading") as status:
        from vision_tokens.answering import prepare
        from vision_tokens.loading import load, open_picture

        loaded, processor = load(model)
        samples = [prepare(processor, open_picture(file), text) for file, text in asked]
        status.update(f"reading {len(samples)} prompts")
        save_recipe([fit(loaded, samples, **{name: given[name] for name in names})], output)
    typer.echo(f"{method} for {model}, prompts read: {len(samples)}, recipe: {output}")


def _answer(model: str, image: Path, question: str, methods: Sequence[Method], longest: int) -> None:
    with working("loading") as status:
        from vision_tokens.answering import ask, prepare
        from vision_tokens.loading import load, open_picture

        picture = open_picture(image)
        loaded, processor = load(model)
        status.update("answering")
        found = ask(loaded, processor, prepare(processor, picture, question), methods, longest)
    typer.echo(found.text)
    if found.report is not None:
        typer.echo(str(found.report))


def demo(
    image: Annotated[Path | None, IMAGE] = None,
    question: Annotated[str | None, QUESTION] = None,
    model: Annotated[str | None, MODEL] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where the drawing goes, a PNG.")] = Path("demo.png"),
    longest: Annotated[int, LONGEST] = 64,
) -> None:
    """Answer questions about pictures, dense and decorated side by side, and draw which visual tokens were kept."""
    from mmaccel import pocket

    if image is not None and question is None:
        raise ValueError(f"what is to be asked about {image}? Add --question TEXT")
    if output.suffix.lower() != ".png" or not output.absolute().parent.is_dir():
        raise ValueError(f"the drawing goes to a .png file in a folder that exists; got --output {output}")
    models = [model] if model else [name for name in DEMO_MODELS if name in pocket.names()]
    if not models:
        raise FileNotFoundError(
            "no pocket model is installed; give a checkpoint folder with --model PATH, or train one with "
            f"`mmaccel pocket train {DEFAULT_MODEL}`"
        )
    drawings = []
    for name in models:
        drawings += _show_model(name, _questions(name, image, question), longest)

    from vision_tokens.overlay import stacked

    stacked(drawings).save(output)
    typer.echo(f"which tokens each method kept: {output}")


def _questions(model: str, image: Path | None, question: str | None) -> list[tuple[Path, str, str | None]]:
    """What to ask: (picture, question, right answer if known)."""
    from mmaccel.pocket.pictures import pictures

    if image is not None:
        return [(image, str(question), None)]
    shipped = pictures(model if model in DEMO_MODELS else DEFAULT_MODEL)
    if question is not None:
        return [(picture.file, question, dict(picture.questions).get(question)) for picture in shipped]
    return [
        (picture.file, text, right) for picture in shipped for text, right in picture.questions[:QUESTIONS_A_PICTURE]
    ]


def _variants() -> dict[str, list[Method]]:
    """What the demo compares, by label; the first is the model as it is."""
    from vision_tokens import FourierVLM, HiRED, RandomTokens

    return {
        "dense": [],
        "HiRED 20 %": [HiRED(budget=0.2)],
        "Fourier-VLM 25 %": [FourierVLM(budget=0.25)],
        "random 20 %": [RandomTokens(budget=0.2)],
    }


def _show_model(name: str, questions: Sequence[tuple[Path, str, str | None]], longest: int) -> list[Any]:
    """Prints one model's table, and returns a drawing for every picture.

    Times are taken with the first question of each picture, while nothing else runs here, the spinner included.
    """
    title = Path(name).name
    listing = table("picture and question", *COLUMNS, title=title)
    for column in (1, *range(3, 3 + len(COLUMNS) - 2)):
        listing.columns[column].no_wrap = True
    drawings: dict[Path, Any] = {}
    with working(f"{title}: loading") as status:
        from vision_tokens.answering import ask, prepare, speeds
        from vision_tokens.loading import load, open_picture

        pictures = {file: open_picture(file) for file, _, _ in questions}
        model, processor = load(name)
        variants = _variants()
        for number, (file, question, right) in enumerate(questions, 1):
            status.update(f"{title}: question {number} of {len(questions)}")
            inputs = prepare(processor, pictures[file], question)
            answers = {label: ask(model, processor, inputs, methods, longest) for label, methods in variants.items()}
            costs = _costs(answers)
            if file not in drawings:
                drawings[file] = _drawing(
                    f"{title}, {file.name}: {question}", processor, inputs, pictures[file], answers
                )
                status.stop()
                for label, pace in speeds(model, inputs, variants).items():
                    costs[label] += [f"{pace.first_token_seconds * 1e3:.1f} ms", f"{pace.tokens_per_second:.0f}"]
                status.start()
            asked = [file.name, question, *([f"right: {right}"] if right else [])]
            for label, beside in zip_longest(variants, asked):
                said = _verdict(answers[label].text, right)
                listing.add_row(beside, label, said, *costs[label])
            listing.add_section()
    show(listing)
    return list(drawings.values())


def _verdict(said: str, right: str | None) -> str:
    """An answer in a few words, marked right or wrong if that is known."""
    from rich.markup import escape

    short = escape(_short(said))
    return short if right is None else f"{short} [green]✓[/]" if said == right else f"{short} [red]✗[/]"


def _short(said: str) -> str:
    return said if len(said) <= SHOWN else said[: SHOWN - 1] + "…"


def _costs(answers: Mapping[str, Answer]) -> dict[str, list[str]]:
    """Visual tokens, prefill FLOPs and KV bytes of every variant; the dense ones are what a report compares with."""
    from mmaccel.reports import figure

    def cells(report: Report, dense: bool) -> list[str]:
        names = ("visual_tokens", "prefill_flops", "kv_bytes")
        tokens, flops, size = (report.quantities[name].read()[dense] for name in names)
        return [str(tokens), figure(float(flops or 0)), f"{figure(float(size or 0))}B"]

    some = _some_report(answers)
    return {label: cells(found.report or some, found.report is None) for label, found in answers.items()}


def _some_report(answers: Mapping[str, Answer]) -> Report:
    return next(found.report for found in answers.values() if found.report is not None)


def _drawing(title: str, processor: Any, inputs: Any, picture: Any, answers: Mapping[str, Answer]) -> Any:
    """One sheet: what every variant kept of a picture."""
    from vision_tokens.overlay import Panel, draw_layouts, encoder_pictures, sheet

    layouts = _some_report(answers).details["layouts"]
    partitions = sum(layout.partitions for layout in layouts)
    seen = encoder_pictures(processor.image_processor, inputs["pixel_values"], picture, partitions)
    panels = []
    for label, found in answers.items():
        cells = [layout.valid() for layout in layouts] if found.report is None else found.report.details["cells"]
        kept = sum(int(layout.tokens_of(keep).sum()) for layout, keep in zip(layouts, cells, strict=True))
        panels.append(Panel(draw_layouts(layouts, cells, seen), f"{label}: {kept} tokens\n{_short(found.text)}"))
    return sheet(title, panels)
