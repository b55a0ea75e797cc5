"""The table of who may import whom, kept true by walking the imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
MAY_IMPORT = {
    "mmaccel": set(),
    "vision_tokens": {"mmaccel"},
    "diffusion": {"mmaccel"},
    "video": {"mmaccel"},
    "robotics": {"mmaccel", "vision_tokens"},
}
OPTIONAL = {"open_clip", "gradio", "ray", "av", "cv2", "pyarrow", "matplotlib", "torchvision"}
ROOMS = [room for room in MAY_IMPORT if (HOUSE / room).is_dir()]


def imported(file: Path) -> Iterator[tuple[str, bool]]:
    """The package of every import in a file, and whether it stands at module level."""
    tree = ast.parse(file.read_text(), file.name)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if node.level == 0 else []
        for name in names:
            yield name.partition(".")[0], id(node) not in inside


@pytest.mark.parametrize("room", ROOMS)
def test_a_package_imports_only_the_rooms_that_the_table_allows(room):
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[room] - {room} | {"demos", "mmaccel_demos", "tests"}
    found = {
        f"{file.relative_to(HOUSE)}: {name}"
        for file in (HOUSE / room).rglob("*.py")
        for name, _ in imported(file)
        if name in forbidden
    }
    assert not found


@pytest.mark.parametrize("room", ROOMS)
def test_optional_libraries_are_imported_inside_functions(room):
    found = {
        f"{file.relative_to(HOUSE)}: {name}"
        for file in (HOUSE / room).rglob("*.py")
        for name, top in imported(file)
        if top and name in OPTIONAL
    }
    assert not found


def test_the_walk_finds_imports_wherever_they_stand(tmp_path):
    file = tmp_path / "example.py"
    file.write_text("import os.path\nfrom av import open\ndef f():\n    import ray, cv2\nfrom . import g\n")
    assert list(imported(file)) == [("os", True), ("av", True), ("ray", False), ("cv2", False)]
