"""What a batch job can do: a task, found by its name through the entry-point group `mmaccel.tasks`.

A task is a frozen, keyword-only dataclass; its fields are what a row of a job file says beside `task`, `model`,
`recipe`, `seed` and `output`.  An instance is one job; the class knows how to load a model and to run jobs on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from mmaccel.methods import Method
from mmaccel.registry import entries, find_class

GROUP = "mmaccel.tasks"
"""The entry-point group under which tasks are found."""


class Task(ABC):
    """Base class of every task.  Subclasses are frozen, keyword-only dataclasses; a field is a column of a job file."""

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()
    """Fields that name a file, or None; the file's content is part of the job's identity."""
    alike: ClassVar[tuple[str, ...]] = ()
    """Fields in which the jobs of one batch agree."""
    holds: ClassVar[Literal["model", "pipeline"]] = "model"
    """What the folder of a job's model holds."""
    default_model: ClassVar[str | None] = None
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    @classmethod
    @abstractmethod
    def check(cls, methods: Sequence[Method]) -> None:
        """Raises ValueError, with the mend, for a recipe that this task cannot follow."""

    @classmethod
    def batches(cls, methods: Sequence[Method]) -> bool:
        """Whether jobs with this recipe may be run together."""
        return True

    @classmethod
    @abstractmethod
    def load(cls, model: Path | None, device: str) -> Any:
        """What jobs run on, loaded once a worker.  model: its folder; None where the task needs none."""

    @classmethod
    @abstractmethod
    def run(
        cls, host: Any, methods: Sequence[Method], jobs: Sequence[Self], seeds: Sequence[int], stems: Sequence[Path]
    ) -> list[dict[str, Any]]:
        """Runs jobs together and writes the files of each: its stem and one ending, such as stem.png.

        The files hold nothing that changes from run to run, such as seconds.  Returns a report a job, plain data; its
        "spent" counts evaluations by name.
        """


def list_tasks() -> list[str]:
    """The names of all installed tasks, sorted.  Imports none of them."""
    return sorted(entries(GROUP))


def get_task(name: str) -> type[Task]:
    """The class of the task called `name`.  Raises ValueError, naming the nearest, if there is none."""
    return find_class(GROUP, name, Task)  # type: ignore[type-abstract]  # its subclasses are not
