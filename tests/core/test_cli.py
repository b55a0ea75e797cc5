"""The command line of the core: its listings, its exit codes, its one-line errors, and how little it imports."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner, Result

from mmaccel import cli
from mmaccel.methods import get_method, list_methods
from tests.core.required import required

HEAVY = ("torch", "transformers", "pydantic_core", "numpy", "PIL", "matplotlib", "scipy")


def mmaccel(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def complaint(result: Result) -> str:
    """The error of a failed command: one line on stderr, nothing on stdout."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    return line


def test_help_names_every_command_and_imports_nothing_heavy():
    script = (
        "import sys\n"
        "from mmaccel.cli import app\n"
        "try:\n    app(['--help'], prog_name='mmaccel')\n"
        "except SystemExit as done:\n    assert not done.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for command in ("methods", "check", "bench", "pocket", "answer", "demo", "generate", "keyframes", "run"):
        assert f" {command} " in done.stdout
    assert done.stdout.endswith("HEAVY []\n")


def test_the_listing_holds_every_method_and_a_user_can_build_each_from_it():
    listed = json.loads(mmaccel("methods", "--json").stdout)
    assert [method["method"] for method in listed] == list_methods()
    for method in listed:
        cls = get_method(method["method"])
        defaults = {name: setting["default"] for name, setting in method["settings"].items() if "default" in setting}
        data = {"method": method["method"], "version": method["version"], **defaults, **required(cls)}
        assert cls.from_dict(data) == cls.from_dict(required(cls))


def test_the_table_shows_stage_and_defaults():
    result = mmaccel("methods")
    assert result.exit_code == 0
    assert "hired" in result.stdout
    assert "prefill" in result.stdout
    assert "budget=0.2" in result.stdout
    assert "preset llava-next-20" in result.stdout


def test_an_unknown_command_names_the_nearest():
    assert "there is no command 'mehtods'; did you mean 'methods'?" in complaint(mmaccel("mehtods"))


def test_an_unknown_method_names_the_nearest():
    assert "there is no method 'hird'; did you mean 'hired'?" in complaint(mmaccel("check", "anywhere", "hird"))


def test_an_unknown_setting_lists_the_settings():
    line = complaint(mmaccel("check", "anywhere", "hired", "--set", "bugdet=0.3"))
    assert "'bugdet'; did you mean 'budget'? known: alpha, budget" in line


def test_an_unknown_bench_names_the_nearest():
    assert "did you mean 'vision-tokens'?" in complaint(mmaccel("bench", "visiontokens"))


def test_an_unknown_pocket_model_is_named():
    assert "there is no pocket model 'pocket-nothing'" in complaint(mmaccel("pocket", "path", "pocket-nothing"))
    assert "no training script for 'pocket-nothing'" in complaint(mmaccel("pocket", "train", "pocket-nothing"))


def test_a_missing_argument_is_an_error_too():
    result = mmaccel("check")
    assert result.exit_code == 2
    assert "Missing argument" in result.stderr


def test_traceback_asks_for_the_place_of_an_error():
    with pytest.raises(ValueError, match="no method 'hird'"):
        CliRunner().invoke(cli.app, ["--traceback", "check", "anywhere", "hird"], catch_exceptions=False)


def test_a_failure_of_the_run_itself_ends_in_exit_code_1(monkeypatch):
    def broken(name):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr("mmaccel.pocket.path", broken)
    result = mmaccel("pocket", "path", "pocket-llava")
    assert result.exit_code == 1
    assert result.stderr == "error: the disk is on fire\n"


class FromOutside:
    """An entry point of somebody else's package."""

    value = "elsewhere:greet"

    def __init__(self, name, load):
        self.name, self.load = name, load


def installed(monkeypatch, group, name, load):
    before = cli.entries(group)
    found = {group: {**before, name: FromOutside(name, load)}}
    monkeypatch.setattr(cli, "entries", lambda group: found.get(group, {}))


def test_an_installed_package_adds_a_command(monkeypatch):
    def greet(name: str, loudly: bool = False) -> None:
        """Greet somebody."""
        print(f"hello {name}" + "!" * loudly)

    installed(monkeypatch, "mmaccel.commands", "greet", lambda: greet)
    assert "Greet somebody." in mmaccel("--help").stdout
    assert mmaccel("greet", "Ada", "--loudly").stdout == "hello Ada!\n"


def test_a_command_that_cannot_be_imported_leaves_the_others_alone(monkeypatch):
    def load():
        raise ImportError("no module named 'gradio'")

    installed(monkeypatch, "mmaccel.commands", "window", load)
    assert "cannot be imported" in mmaccel("--help").stdout
    assert "'window' (elsewhere:greet) cannot be imported: no module named 'gradio'" in complaint(mmaccel("window"))


def test_check_says_which_law_broke_and_ends_in_exit_code_1(monkeypatch):
    from mmaccel.checks import CheckReport, LawResult

    laws = [LawResult("dropping equals masking", 0.5, 1e-4), LawResult("the second call equals the first", 0.0, 0.0)]
    given = {}

    def check(target, method, processor=None, inputs=None):
        given.update(target=target, method=method, processor=processor)
        return CheckReport(method, laws)

    installed(monkeypatch, "mmaccel.loaders", "prefill", lambda: lambda model: (f"model of {model}", "processor"))
    monkeypatch.setattr("mmaccel.checks.check", check)
    result = mmaccel("check", "folder", "hired", "--set", "budget=0.3")
    assert result.exit_code == 1
    assert "BROKEN" in result.stdout
    assert "hired on folder: FAILED" in result.stdout
    assert given["method"].budget == 0.3
    assert (given["target"], given["processor"]) == ("model of folder", "processor")
    del laws[0]
    assert mmaccel("check", "folder", "hired").exit_code == 0


def test_a_method_without_a_loader_is_checked_in_python(monkeypatch):
    monkeypatch.setattr(cli, "entries", lambda group: {})
    assert "no installed package can load a model for hired" in complaint(mmaccel("check", "folder", "hired"))


def test_a_bench_is_run_with_its_options_and_its_figures_are_saved(monkeypatch, tmp_path):
    from dataclasses import dataclass
    from typing import ClassVar

    from mmaccel.bench import Bench, BenchResult, Figure, option

    @dataclass(frozen=True, kw_only=True)
    class Counting(Bench):
        """Counts."""

        name: ClassVar[str] = "counting"
        rounds: int = option(3, "how far")

        def run(self, progress):
            progress("counting", 1, self.rounds)
            return BenchResult("counting", {}, {"total": Figure(self.rounds, unit="rounds")})

        def plot(self, result, path):
            path.write_text("drawn")

    monkeypatch.setattr("mmaccel.bench.get_bench", lambda name: Counting)
    files = ["--json", tmp_path / "figures.json", "--plot", tmp_path / "figures.png"]
    result = mmaccel("bench", "counting", "--set", "rounds=5", *files)
    assert result.exit_code == 0
    assert "5 rounds" in result.stdout
    assert json.loads((tmp_path / "figures.json").read_text())["figures"]["total"]["value"] == 5
    assert (tmp_path / "figures.png").read_text() == "drawn"
    assert "no option 'round'; did you mean 'rounds'?" in complaint(mmaccel("bench", "counting", "--set", "round=5"))
    assert "written name=value" in complaint(mmaccel("bench", "counting", "--set", "rounds"))
    assert "does not exist" in complaint(mmaccel("bench", "counting", "--json", tmp_path / "no" / "figures.json"))
