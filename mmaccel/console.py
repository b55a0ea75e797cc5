"""What the commands print with: tables on stdout, a spinner and errors on stderr.  rich is imported when used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def table(*columns: str, title: str | None = None) -> Any:
    """An empty rich table in the house's style."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def show(thing: Any) -> None:
    """Prints text or a table on stdout; tables get 120 columns where no terminal says otherwise."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 120))
    console.print(thing)


@contextmanager
def working(what: str) -> Iterator[Any]:
    """A spinner on stderr while something takes long; call `update(text)` on what the block gets."""
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield status


def complain(error: Exception) -> None:
    """One red line on stderr, unwrapped, so that it can be searched and piped."""
    from rich.console import Console
    from rich.text import Text

    message = " ".join(str(error).split()) or type(error).__name__
    Console(stderr=True, soft_wrap=True).print(Text(f"error: {message}", style="bold red"))
