"""Names of outputs, and files moved to them: nothing is ever written outside the folder, whatever a job file says."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path

LONGEST_PART = 200  # bytes; most file systems allow 255, endings included
LONGEST = 1000  # bytes
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def check_name(name: str) -> str:
    """The name, if it is one for an output: "cats/0001".  Raises ValueError that says what is wrong with it."""
    if not name:
        raise ValueError('an output needs a name, e.g. "cats/0001"')
    if not name.isprintable() or "\\" in name or ":" in name:
        raise ValueError(f"a name holds no backslash, colon or unprintable letter; got {name!r}")
    if name.startswith("/"):
        raise ValueError(f"a name stays inside the output folder; got the absolute {name!r}")
    parts = name.split("/")
    if ".." in parts:
        raise ValueError(f'a name stays inside the output folder; got ".." in {name!r}')
    if any(not part or part.startswith(".") or part != part.strip() for part in parts):
        raise ValueError(f"the parts of a name are not empty and begin with no dot or blank; got {name!r}")
    sizes = [len(part.encode("utf-8", "surrogatepass")) for part in parts]
    if max(sizes) > LONGEST_PART or sum(sizes) > LONGEST:
        raise ValueError(f"a part of a name has at most {LONGEST_PART} bytes, all {LONGEST}; got {name[:40]!r}...")
    return name


def place(file: Path, root: Path, name: str, ending: str) -> None:
    """Moves a finished file to its name below `root`, in one step: readers see all of it, or nothing.

    Folders on the way are made.  A link on the way is refused with NotADirectoryError; one in the file's own place is
    replaced and never followed.
    """
    *parts, last = name.split("/")
    with ExitStack() as opened:
        folder = os.open(root, FOLDER)
        opened.callback(os.close, folder)
        for part in parts:
            folder = _inside(folder, part)
            opened.callback(os.close, folder)
        os.replace(file, last + ending, dst_dir_fd=folder)


def _inside(folder: int, part: str) -> int:
    with suppress(FileExistsError):
        os.mkdir(part, dir_fd=folder)
    try:
        return os.open(part, FOLDER, dir_fd=folder)
    except OSError:
        raise NotADirectoryError(
            f"{part!r} on the way to an output is no folder, or a link; nothing is written through links: remove it"
        ) from None
