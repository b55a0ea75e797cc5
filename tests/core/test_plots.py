"""The plots: drawn to the file that was asked for, or an error that says what is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from mmaccel.plots import Point, pareto

AXES = {"title": "pocket", "cost": "tokens (%)", "quality": "accuracy (%)"}


def test_a_pareto_curve_is_drawn_as_a_picture(tmp_path: Path) -> None:
    curves = {"hired": [Point(20, 95, 93, 97), Point(5, 80, 78, 82)], "random": [Point(20, 70, 66, 74)]}
    pareto(curves, tmp_path / "curve.png", reference=97.0, **AXES)
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size[0] > 500 and len(picture.convert("L").getcolors() or []) > 10


def test_an_empty_plot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a Pareto plot needs at least one point"):
        pareto({"hired": []}, tmp_path / "curve.png", **AXES)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'mmaccel\[plots\]'"):
        pareto({"hired": [Point(1, 1, 1, 1)]}, tmp_path / "curve.png", **AXES)
