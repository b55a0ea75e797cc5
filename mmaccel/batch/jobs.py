"""Jobs: rows of a job file, checked field by field.  A row is data: nothing that it says is imported or run."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from mmaccel.batch.identity import digest, fingerprint, folder_fingerprint
from mmaccel.batch.names import check_name
from mmaccel.batch.rows import Row, read_rows
from mmaccel.batch.tasks import Task, get_task, list_tasks
from mmaccel.checkpoints import find_folder
from mmaccel.methods import Method
from mmaccel.plain_data import adapter
from mmaccel.recipes import read_recipe, recipe_from_data
from mmaccel.registry import suggest

CODE = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")
RECIPES = 4096  # different recipes that are remembered while a file is read
FILES = 65536  # likewise, files of inputs


@dataclass(frozen=True, kw_only=True)
class Header:
    """What every row says, whatever its task.

    task: as `mmaccel.tasks` are named.  model: a folder, from the job file's own, or a pocket model; the task's default
    where it is left away.  recipe: methods, a list of mappings, such a list as JSON text, or a recipe file.  seed: of
    everything random.  output: the name of the files that the job writes, e.g. "cats/0001".
    """

    task: str
    model: str | None = None
    recipe: str | dict[str, Any] | list[Any] = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    output: str


HEADER = tuple(field.name for field in dataclasses.fields(Header))


@dataclass(frozen=True)
class Group:
    """What jobs share that may be run together: task, model, recipe, and the settings in which a batch agrees.

    model: as the job file says it, or the task's default; None where the task needs none.  key: the hash of it all.
    """

    task: str
    model: str | None
    model_hash: str
    recipe: tuple[Mapping[str, Any], ...]
    recipe_hash: str
    batches: bool
    key: str


@dataclass(frozen=True)
class Job:
    """One checked row.  number: its place in the file, from 0.  content: the hash of what it asks for, name aside."""

    number: int
    line: int
    output: str
    group: Group
    seed: int
    inputs: dict[str, Any]
    input_hash: str
    content: str


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row.  line: in the file.  field: which column; empty for the row as a whole."""

    line: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.field}{': ' if self.field else ''}{self.message}"


class JobFile:
    """A job file: `jobs` reads it anew each time, a row at a time.

    path: the file; what its rows name is looked for from its folder.  allow_code: whether recipes may name functions
    of installed packages ("package.module:function"), which are then imported.
    """

    def __init__(self, path: str | Path, allow_code: bool = False) -> None:
        self.path, self.allow_code = Path(path), allow_code
        self.folder = self.path.absolute().parent
        self._group = lru_cache(RECIPES)(self._make_group)
        self._task = lru_cache(get_task)
        self._print = lru_cache(FILES)(lambda name: fingerprint(self.folder / name))

    def jobs(self) -> Iterator[Job | list[Problem]]:
        """Every row as a job, or as all that is wrong with it."""
        for number, (line, row) in enumerate(read_rows(self.path)):
            yield [Problem(line, "", row)] if isinstance(row, str) else self._job(number, line, row)

    def first_tasks(self) -> tuple[str, ...]:
        """The task of the first row, so that workers may import it early; none if that row is wrong."""
        row: Any = next((row for _, row in read_rows(self.path)), None)
        task = row.get("task") if isinstance(row, dict) else None
        return (task,) if task in list_tasks() else ()

    def _job(self, number: int, line: int, row: Row) -> Job | list[Problem]:
        header = _checked(Header, {name: row[name] for name in HEADER if name in row}, line)
        if isinstance(header, list):
            return header
        try:
            check_name(header.output)
        except ValueError as error:
            return [Problem(line, "output", str(error))]
        try:
            task = self._task(header.task)
        except ValueError as error:
            return [Problem(line, "task", str(error))]
        given = {name: value for name, value in row.items() if name not in HEADER}
        job = _checked(task, given, line)
        if isinstance(job, list):
            return job
        inputs = dict(vars(job))
        prints, problems = self._fingerprints(task, inputs, line)
        alike = digest([inputs[name] for name in task.alike]) if task.alike else ""
        recipe = header.recipe if isinstance(header.recipe, str) else json.dumps(header.recipe)
        group = self._group(header.task, header.model, recipe, alike)
        if isinstance(group, tuple):
            problems.append(Problem(line, *group))
        if problems or isinstance(group, tuple):
            return problems
        input_hash = digest({**inputs, **prints})
        content = digest([group.key, input_hash, header.seed])
        return Job(number, line, header.output, group, header.seed, inputs, input_hash, content)

    def _fingerprints(
        self, task: type[Task], inputs: Mapping[str, Any], line: int
    ) -> tuple[dict[str, str], list[Problem]]:
        found, problems = {}, []
        for name in task.files:
            if inputs[name] is not None:
                try:
                    found[name] = self._print(inputs[name])
                except (OSError, ValueError) as error:  # ValueError: a NUL in the name
                    reason = error.strerror if isinstance(error, OSError) else error
                    file = str(self.folder / inputs[name])
                    problems.append(Problem(line, name, f"{file!r} cannot be read: {reason}"))
        return found, problems

    def _make_group(self, task: str, model: str | None, recipe: str, alike: str) -> Group | tuple[str, str]:
        """The group, or the field and the message of what is wrong; the same for all rows that say the same."""
        kind = get_task(task)
        try:
            methods = self._methods(recipe)
            kind.check(methods)
        except (ValueError, TypeError, OSError, ImportError) as error:
            return "recipe", str(error)
        plain = tuple(method.to_dict() for method in methods)
        model = model or kind.default_model
        try:
            folder = model_folder(model, kind, self.folder)
            model_hash = folder_fingerprint(folder) if folder else ""
        except (ValueError, OSError) as error:
            return "model", str(error)
        recipe_hash = digest(plain)
        key = digest([task, model_hash, recipe_hash, alike])
        return Group(task, model, model_hash, plain, recipe_hash, kind.batches(methods), key)

    def _methods(self, recipe: str) -> list[Method]:
        if not recipe:
            return []
        data = json.loads(recipe) if recipe.lstrip()[:1] in ("[", "{") else read_recipe(self.folder / recipe)
        if not self.allow_code and (reference := find_code(data)):
            raise ValueError(
                f"{reference!r} names code, and job files are data; use a registered name, or, if you trust this file, "
                "say --allow-code"
            )
        return recipe_from_data(data) if data else []


def model_folder(model: str | None, task: type[Task], base: Path) -> Path | None:
    """The folder of a job's model, looked for from `base`.  Raises FileNotFoundError if there is none."""
    if model is None:
        return None
    return find_folder(base / model if (base / model).is_dir() else model, task.holds)


def find_code(data: Any) -> str | None:
    """The first text in plain data that has the form of a reference to code, "package.module:name"."""
    if isinstance(data, str):
        return data if CODE.fullmatch(data) else None
    values = data.values() if isinstance(data, Mapping) else data if isinstance(data, list | tuple) else ()
    return next((found for value in values if (found := find_code(value)) is not None), None)


def _checked(cls: Any, given: Row, line: int) -> Any:
    """An instance of a dataclass, or all that is wrong with its fields."""
    try:
        return adapter(cls).validate_python(given)
    except ValidationError as error:
        known = [field.name for field in dataclasses.fields(cls)] + ([] if cls is Header else list(HEADER))
        return [_problem(line, problem, known) for problem in error.errors(include_url=False)]


def _problem(line: int, problem: Any, known: list[str]) -> Problem:
    field = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] in ("missing", "missing_argument"):
        return Problem(line, field, "this field is missing")
    if field not in known and field:
        return Problem(line, field, f"there is no such field; {suggest(field, known)}")
    message = str(problem["msg"]).removeprefix("Value error, ")
    return Problem(line, field, message if not field else f"{message}; got {problem['input']!r:.80}")
