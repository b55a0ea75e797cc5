"""What the README shows runs as it stands there."""

import re
from pathlib import Path

from mmaccel import pocket
from mmaccel.methods import list_methods
from tests.checkpoints import save_llava
from vision_tokens.families import FAMILIES

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_python_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    """On a tiny checkpoint in the place of the embedded language model, and on the embedded pipeline."""
    places = {name: pocket.path(name) for name in pocket.names()} | {"pocket-llava": save_llava(tmp_path / "llava")}
    monkeypatch.setattr("mmaccel.pocket.path", places.__getitem__)
    monkeypatch.chdir(Path(__file__).parents[2])
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 4
    names = {}
    for example in examples:
        exec(example, names)
    Path("film.mp4").unlink()
    printed = capsys.readouterr().out
    assert "visual tokens: 144 -> 28 tokens" in printed
    (rows,) = re.findall(r"denoiser rows: 20 -> (\d+)", printed)
    assert 280 < int(rows) <= 300
    assert names["success"]
    assert names["image"].size == (32, 32)
    assert names["inputs"]["pixel_values"].shape[0] == 8 and "'verified': {'" in printed


def test_the_tables_name_every_method_and_every_family():
    for name in [*list_methods(), *FAMILIES]:
        assert f"`{name}`" in README
