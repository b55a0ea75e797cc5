"""The documentation: every example runs as it stands there, every command exists, every method has a page."""

import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import mmaccel
from mmaccel import cli
from mmaccel.methods import get_method, list_methods
from tests.checkpoints import save_llava
from tests.diffusion.autoregressive.tiny import near, tiny

HOUSE = Path(__file__).parents[2]
PAGES = sorted(HOUSE.glob("docs/**/*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: str, *kinds: str) -> list[str]:
    """The code blocks of these kinds in a page."""
    return [code for kind, code in BLOCK.findall((HOUSE / page).read_text()) if kind in kinds]


def lines(page: str) -> list[str]:
    """The commands of a page's shell blocks, a line each."""
    found = [line for code in blocks(page, "sh") for line in code.replace("\\\n", " ").splitlines()]
    return [
        shlex.join(words).removeprefix(".venv/bin/") for line in found if (words := shlex.split(line, comments=True))
    ]


def ran(line: str) -> int:
    """The exit code of a command of ours."""
    with pytest.raises(SystemExit) as end:
        cli.app(shlex.split(line)[1:])
    return int(end.value.code or 0)


def test_the_walk_finds_every_page_with_code():
    with_code = {str(page.relative_to(HOUSE)) for page in PAGES if BLOCK.search(page.read_text())}
    assert with_code == {
        "docs/lmms-eval.md",
        "docs/reliability.md",
        "docs/guides/choose-a-method.md",
        "docs/guides/decorate.md",
        "docs/guides/demos.md",
        "docs/guides/run-a-big-batch.md",
        "docs/methods/replay.md",
        "docs/methods/vla-cache.md",
    }


def test_how_to_choose_runs(monkeypatch, capsys):
    monkeypatch.chdir(HOUSE)
    (code,) = blocks("docs/guides/choose-a-method.md", "python")
    exec(code, {})
    printed = capsys.readouterr().out
    assert printed.startswith("green\n") and "hired + fastv" in printed


def test_a_finalist_is_replayed(capsys):
    (code,) = blocks("docs/methods/replay.md", "python")
    exec(code, {})
    assert capsys.readouterr().out == "32 rows searched, 4 rows replayed\n"


def test_an_episode_rests_on_the_step_before(capsys):
    (code,) = blocks("docs/methods/vla-cache.md", "python")
    exec(code, {})
    assert capsys.readouterr().out.strip() in (HOUSE / "docs/methods/vla-cache.md").read_text()


def test_the_recipe_of_a_page_is_one(tmp_path):
    (text,) = blocks("docs/guides/decorate.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(text)
    assert [method.described() for method in mmaccel.load_recipe(tmp_path / "recipe.yaml")]


def test_the_job_file_of_the_guide_is_right(tmp_path):
    from mmaccel.batch.jobs import Job, JobFile

    (text,) = blocks("docs/guides/run-a-big-batch.md", "json")
    (tmp_path / "jobs.jsonl").write_text(text)
    (tmp_path / "recipe.yaml").write_text("- method: hired")
    for file in ("photo.jpg", "film.mp4"):
        (tmp_path / file).touch()
    assert all(isinstance(row, Job) for row in JobFile(tmp_path / "jobs.jsonl").jobs())


def test_lmms_eval_runs_on_a_stand_in_for_the_library(monkeypatch, tmp_path, capsys):
    """The wrapper holds a tiny model; the evaluator asks it one question."""
    from vision_tokens.answering import prepare
    from vision_tokens.loading import load, open_picture

    picture = open_picture(HOUSE / "mmaccel/pocket/pictures/three-things.png")

    class Wrapper:
        def __init__(self, **given: Any) -> None:
            self.model, self.processor = load(save_llava(tmp_path / "llava"))

    def evaluate(model: Wrapper, tasks: list[str]) -> dict[str, Any]:
        model.model.generate(**prepare(model.processor, picture, "what colour is the cross?"), max_new_tokens=1)
        return {"results": dict.fromkeys(tasks, 1.0)}

    for name, content in {
        "lmms_eval": {}, "lmms_eval.models": {}, "lmms_eval.models.simple": {},
        "lmms_eval.models.simple.llava_hf": {"LlavaHf": Wrapper}, "lmms_eval.evaluator": {"simple_evaluate": evaluate},
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    (code,) = blocks("docs/lmms-eval.md", "python")
    exec(code, {})
    assert "visual tokens: 144 -> 28" in capsys.readouterr().out


def test_the_readmes_speculation_runs(capsys):
    from diffusion.autoregressive import ContinuousSpeculation

    target = tiny()
    names = {
        "mmaccel": mmaccel,
        "target": target,
        "small": near(target),
        "ContinuousSpeculation": ContinuousSpeculation,
    }
    (code,) = [code for code in blocks("README.md", "py") if "ContinuousSpeculation" in code]
    exec(code, names)
    assert names["images"].shape[0] == 8 and "acceptance" in capsys.readouterr().out


def test_the_big_batch_runs(monkeypatch, tmp_path, capsys):
    """Its Python, and between the two parts the commands that run the jobs and export what came of them."""
    monkeypatch.chdir(tmp_path)
    write, read = blocks("docs/guides/run-a-big-batch.md", "python")
    exec(write, {})
    for line in dict.fromkeys((*lines("docs/guides/run-a-big-batch.md"), *lines("README.md"))):
        if line.startswith("mmaccel batch") and "--engine ray" not in line:  # tests/batch holds a cluster
            assert ran(line) == 0, line
    capsys.readouterr()
    exec(read, {})
    assert capsys.readouterr().out == "".join(
        f"{budget}: {tokens} visual tokens, 4 answers as with all\n"
        for budget, tokens in ((1.0, 144), (0.2, 28), (0.1, 14))
    )


def test_the_examples_of_contributing_are_methods():
    import video.dense
    from diffusion.search import Search

    names: dict[str, Any] = {}
    exec(
        "from collections.abc import *\nfrom dataclasses import dataclass\nfrom typing import *\nimport numpy as np\n"
        "from jaxtyping import Bool, Float\nfrom torch import Tensor\nfrom mmaccel import Budget\n"
        "from vision_tokens import *\nfrom vision_tokens.decoder_layers import share_behind\n"
        "from diffusion.search import Rounds, Search\nfrom diffusion.steps import ddim\n"
        "from video.dense import DenseSearch, Positions, Scores\nfrom diffusion.problem import Problem\n"
        "import torch\nfrom robotics.chunk_methods import Call, ChunkMethod\nfrom robotics.policies import Chunk\n",
        names,
    )
    for code in blocks("CONTRIBUTING.md", "python"):
        exec(code, names)
    assert issubclass(names["Greedy"], Search) and issubclass(names["Apart"], video.dense.DenseSearch)
    scores = torch.tensor([0.1, 0.9, 0.3, 0.2]).double().numpy()
    assert names["Apart"]().choose(scores, 2).tolist() == [1, 2]
    assert names["Centre"]().budget == 0.2 and list(names["Latest"]().cuts(4)) == [1]


@pytest.mark.parametrize("page", ["README.md", *(str(page.relative_to(HOUSE)) for page in PAGES)])
def test_the_commands_of_a_page_exist(page):
    import typer

    known = typer.main.get_command(cli.app).list_commands(None)  # type: ignore[arg-type]
    named = re.findall(r"`mmaccel ([a-z]+)", (HOUSE / page).read_text())
    named += [line.split()[1] for line in lines(page) if line.startswith("mmaccel ")]
    assert set(named) <= set(known)


def test_no_block_of_a_page_goes_unread():
    """Python, recipes and jobs are run above, each page's by its test; of shell lines, all that `elsewhere` lacks."""
    kinds = {kind for page in ["README.md", *map(str, PAGES)] for kind, _ in BLOCK.findall((HOUSE / page).read_text())}
    assert kinds == {"python", "py", "sh", "yaml", "json"}
    elsewhere = {
        "make demo": "Makefile", "make test": "Makefile", "pip install 'mmaccel[demo,video]'": "pyproject.toml",
        "mmaccel app": "tests/demos", "MMACCEL_FUZZ=1300": "tests/core/test_fuzzing.py",
    }  # fmt: skip
    mine = ("mmaccel batch", "mmaccel check", "mmaccel demo")
    for page in ["README.md", *(str(page.relative_to(HOUSE)) for page in PAGES)]:
        for line in lines(page):
            assert line.startswith((*mine, *elsewhere)), line
    assert all((HOUSE / place).exists() for place in elsewhere.values())


@pytest.mark.slow
def test_the_commands_on_a_model_of_yours_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vision_tokens.laws.ORACLE_BAR", 100.0)  # the one law that a busy machine may break
    save_llava(tmp_path / "llava")
    stands_for = {
        "path/to/llava-1.5-7b-hf": "llava", "path/to/checkpoint": "llava", "path/to/pipeline": "pocket-turbo",
        "photo.jpg": str(HOUSE / "mmaccel/pocket/pictures/three-things.png"),
    }  # fmt: skip
    wanted = [line for line in lines("README.md") if line.startswith(("mmaccel check", "mmaccel demo"))]
    assert len(wanted) == 3 and set(lines("docs/guides/choose-a-method.md")) <= set(wanted)
    for line in wanted:
        for name, stand_in in stands_for.items():
            line = line.replace(name, stand_in)
        assert ran(line) == 0, line
    assert (tmp_path / "demo.png").exists()


def test_every_method_has_a_page_with_its_source():
    pages = {page.stem: page.read_text() for page in (HOUSE / "docs/methods").glob("*.md")}
    for name in list_methods():
        (text,) = [text for text in pages.values() if f"`{name}`" in text.splitlines()[0]]
        assert get_method(name).__name__ in text
        for part in ("## Formula", "## When to use it", "## Measured", "## Source"):
            assert part in text
        (measured,) = re.findall(r"^## Measured\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
        assert "mmaccel bench" in measured or "```python" in measured
        assert all((HOUSE / "docs/methods" / picture).is_file() for picture in re.findall(r"]\((\S+png)\)", text))
    index = (HOUSE / "docs/index.md").read_text()
    assert all(f"methods/{stem}\n" in index for stem in pages)


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("myst_parser")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(build, cwd=HOUSE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Keep the visual tokens that the encoder" in (tmp_path / "methods" / "hired.html").read_text()
