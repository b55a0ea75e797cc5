"""What the README shows runs as it stands there."""

import re
from pathlib import Path

from mmaccel.methods import list_methods
from tests.checkpoints import save_llava
from vision_tokens.families import FAMILIES

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    """On a tiny checkpoint in the place of the embedded one."""
    folder = save_llava(tmp_path / "llava")
    monkeypatch.setattr("mmaccel.pocket.path", lambda name: folder)
    monkeypatch.chdir(Path(__file__).parents[2])
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(example, {})
    assert "visual tokens: 144 -> 28 tokens" in capsys.readouterr().out


def test_the_tables_name_every_method_and_every_family():
    for name in [*list_methods(), *FAMILIES]:
        assert f"`{name}`" in README
