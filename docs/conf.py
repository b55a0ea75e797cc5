"""Sphinx's settings: Markdown through MyST, API pages from the docstrings.  `make docs` allows no warning."""

import os
import re
from itertools import zip_longest
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

project = "mmaccel"
author = "the mmaccel contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "Faster and better at inference time, without retraining"}
html_show_copyright = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
CODE = re.compile(r"`+([^`]+)`+")


def as_restructured(line: str) -> str:
    """A line of our docstrings: plain prose with `code` in it, where stars and bars are signs and nothing else."""
    parts = CODE.split(line.strip())
    prose = [re.sub(r"([*|\\]|_\b)", r"\\\1", part) for part in parts[::2]]
    code = [f"``{part}``" for part in parts[1::2]]
    return "".join(word for pair in zip_longest(prose, code, fillvalue="") for word in pair)


def rewrite(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Takes docstrings as they are written: indented lines go on, and examples are code."""
    lines[:] = [line.strip() if line.lstrip().startswith((">>>", "...")) else as_restructured(line) for line in lines]


def without_signature(app: Any, what: str, name: str, item: Any, options: Any, signature: str, returns: str) -> Any:
    """Leaves defaults that are no plain data out of a signature."""
    return (signature if signature is None or "<" not in signature else "(...)", None)


def setup(app: Any) -> None:
    """Connects the two rules above."""
    app.connect("autodoc-process-docstring", rewrite)
    app.connect("autodoc-process-signature", without_signature)
