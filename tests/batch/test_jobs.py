"""Job files: every wrong row is found, named by line and field, and nothing that a row says is imported or run."""

from __future__ import annotations

import csv
import json
import sys

import pytest
from typer.testing import CliRunner

from mmaccel.batch.jobs import Job, JobFile, find_code
from mmaccel.batch.rows import count_rows, read_rows
from mmaccel.cli import app
from mmaccel.pocket.pictures import pictures
from tests.batch.toys import toy, write

PICTURE = pictures("pocket-llava")[0].file
ANSWER = {"task": "answer", "image": str(PICTURE), "question": "what?", "output": "a"}
GENERATE = {"task": "generate", "prompt": "a red square", "output": "a"}
KEYFRAMES = {"task": "keyframes", "video": str(PICTURE), "find": ["red square"], "output": "a"}

WRONG = [
    ("no json", r"line 1: this is no JSON object: Expecting value at column 1"),
    ("[1]", r"line 1: a row is a JSON object, .*; got \[1\]"),
    ('{"task": "toy", "task": "toy"}', "line 1: this is no JSON object: 'task' is given twice"),
    ('{"seed": NaN}', "line 1: this is no JSON object: NaN is no number of JSON"),
    (b'{"task": "\xff"}', "line 1: this is no JSON object: 'utf-8' codec can't decode"),
    ("[" * 100_000, "line 1: this is no JSON object"),
    ({"output": "a"}, "line 1: task: this field is missing"),
    ({"task": "toy", "text": ""}, "line 1: output: this field is missing"),
    (toy(0, task="tyo"), "line 1: task: there is no task 'tyo'; did you mean 'toy'"),
    (toy(0, seed=-1), r"line 1: seed: Input should be greater than or equal to 0; got -1"),
    (toy(0, seed="x"), r"line 1: seed: Input should be a valid integer.*; got 'x'"),
    (toy(0, txet="x"), "line 1: txet: there is no such field; did you mean 'text'"),
    (toy(0, do="dance"), "line 1: do: Input should be 'write', .*; got 'dance'"),
    (toy(0, file="nowhere.png"), "line 1: file: '.*nowhere.png' cannot be read: No such file"),
    (toy(0, file="a\0b"), "line 1: file: .* cannot be read: embedded null byte"),
    (toy(0, output="../a"), "line 1: output: .* got \"..\" in '../a'"),
    (toy(0, recipe=[{"method": "hired"}]), "line 1: recipe: a toy follows no recipe"),
    (toy(0, recipe="nowhere.yaml"), "line 1: recipe: .*nowhere.yaml"),
    (toy(0, model="nowhere"), "line 1: model: there is no model 'nowhere'"),
    ({**ANSWER, "recipe": [{"method": "hird"}]}, "line 1: recipe: there is no method 'hird'; did you mean 'hired'"),
    ({**ANSWER, "recipe": [{"method": "hired", "budget": 7.5}]}, "line 1: recipe: hired: the fraction of .*7.5"),
    ({**ANSWER, "recipe": '[{"method": "hired"'}, "line 1: recipe: Expecting"),
    ({**ANSWER, "recipe": [{"method": "best-of-n", "n": 2, "reward": "brightness"}]}, "recipe: best-of-n draws"),
    ({**ANSWER, "video": str(PICTURE)}, 'line 1: a question is about one file: give "image" or "video"'),
    ({**ANSWER, "longest": 0}, "line 1: longest: Input should be greater than or equal to 1; got 0"),
    ({**GENERATE, "recipe": [{"method": "hired"}]}, "line 1: recipe: hired is no search of a diffusers pipeline"),
    ({**GENERATE, "call": {"generator": 1}}, "line 1: generator of the call is not for a job to say"),
    ({**GENERATE, "model": "pocket-llava"}, "line 1: model: .*holds no model_index.json"),
    ({**KEYFRAMES, "recipe": [{"method": "hired"}]}, 'line 1: recipe: keyframes are found by the method "keyframes"'),
    ({**KEYFRAMES, "find": "red square"}, "line 1: find: Input should be a valid list"),
]


def raw(row):
    return row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()


def said(path, **more):
    return [str(problem) for found in JobFile(path, **more).jobs() if isinstance(found, list) for problem in found]


@pytest.mark.parametrize(("row", "message"), WRONG)
def test_a_wrong_row_is_named_by_line_and_field(tmp_path, row, message):
    import re

    path = tmp_path / "jobs.jsonl"
    path.write_bytes(raw(row) + b"\n")
    problems = said(path)
    assert any(re.search(message, problem) for problem in problems), problems


def test_all_wrong_rows_and_fields_are_listed_up_to_a_limit(tmp_path):
    rows = [toy(0), toy(1, seed=-1, txet=0), toy(1), toy(3, output="part-0/0"), toy(4, output="PART-0/0")]
    path = write(tmp_path / "jobs.jsonl", rows)
    done = CliRunner().invoke(app, ["batch", str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert f"{path}, line 2: seed: " in done.stderr
    assert f"{path}, line 4: output: the name 'part-0/0' is taken by line 1" in done.stderr
    assert f"{path}, line 5: output: the name 'PART-0/0' is taken by line 1" in done.stderr
    assert "3 problems in 5 rows; nothing was run" in done.stderr
    write(path, [toy(number, seed=-1) for number in range(70)])
    done = CliRunner().invoke(app, ["batch", str(path), "--check"])
    assert done.stderr.count(": seed: ") == 50
    assert "70 problems in 70 rows (the first 50 are listed)" in done.stderr


@pytest.mark.parametrize(
    "reference",
    [
        {"method": "best-of-n", "n": 2, "reward": "os:getcwd"},
        {"method": "best-of-n", "n": 2, "reward": {"reward": "tests.batch.never_imported:Reward"}},
        {"method": "keyframes", "detector": "tests.batch.never_imported:detect"},
    ],
)
def test_references_to_code_are_refused_before_anything_is_imported(tmp_path, reference):
    task = KEYFRAMES if reference["method"] == "keyframes" else GENERATE
    (tmp_path / "recipe.json").write_text(json.dumps([reference]))
    for recipe in ([reference], json.dumps([reference]), "recipe.json"):
        (problem,) = said(write(tmp_path / "jobs.jsonl", [{**task, "recipe": recipe}]))
        assert "names code, and job files are data; use a registered name, or, if you trust this file, say" in problem
    assert "tests.batch.never_imported" not in sys.modules
    (problem,) = said(write(tmp_path / "jobs.jsonl", [{**task, "recipe": [reference]}]), allow_code=True) or [""]
    assert "names code" not in problem


def test_phrases_are_no_references():
    assert find_code({"targets": ["a red: square", "10:30"], "cues": [{"x": "left of: it"}]}) is None


def test_csv_parquet_and_jsonl_say_the_same(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="PYARROW IS MISSING, so Parquet is not tested: it is an extra")
    from pyarrow import parquet

    recipe = json.dumps([{"method": "hired", "budget": 0.5}])
    rows = [{**ANSWER, "question": f"[{n}", "seed": n, "recipe": recipe, "output": f"a/{n}"} for n in range(3)]
    files = [write(tmp_path / "a.jsonl", rows), tmp_path / "a.csv", tmp_path / "a.parquet"]
    with files[1].open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), files[2])
    found = [[(job.output, job.content) for job in JobFile(file).jobs()] for file in files]
    assert found[0] == found[1] == found[2] and len(found[0]) == 3
    assert [count_rows(file) for file in files] == [3, 3, 3]


def test_wrong_tables_are_named(tmp_path):
    def problems(text):
        (tmp_path / "a.csv").write_text(text)
        return [row for _, row in read_rows(tmp_path / "a.csv") if isinstance(row, str)]

    assert problems("task,task\n") == ["two columns have the same name: task, task"]
    assert problems("task,output\ntoy,a,b\n") == ["3 cells, and the first line names 2 columns"]
    assert "cannot be read from here on" in problems('task,output\n"toy"x,a\n')[0]
    (tmp_path / "a.parquet").write_text("nothing")
    for name, message in (
        ("a.parquet", "is no Parquet file"),
        ("a.txt", "a job file ends in .jsonl, .csv, .parquet; got 'a.txt'"),
        ("b.csv", "there is no job file"),
    ):
        (tmp_path / "a.txt").touch()
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            list(read_rows(tmp_path / name))


def test_an_input_is_known_by_its_content_and_looked_for_from_the_job_file(tmp_path):
    (tmp_path / "one.txt").write_text("same")
    (tmp_path / "two.txt").write_text("same")
    (tmp_path / "three.txt").write_text("other")
    rows = [toy(0, file=name, output=name) for name in ("one.txt", "two.txt", "three.txt")]
    one, two, three = JobFile(write(tmp_path / "jobs.jsonl", rows)).jobs()
    assert isinstance(one, Job) and isinstance(two, Job) and isinstance(three, Job)
    assert one.content == two.content != three.content
