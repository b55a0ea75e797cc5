"""A third party's batch task that needs no model: it writes what it was asked, and with whom, or fails as told."""

import ctypes
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmaccel.batch.tasks import Task

MEMORY = 6  # jobs of the kind "crowd" that fit into memory together


@dataclass(frozen=True, kw_only=True)
class Toy(Task):
    """Write a text.

    do: what goes wrong.  "hold" hangs and lets no other thread of its process run, "crowd" runs out of memory in large
    batches, "once" dies where the file `marker` is not there yet, and makes it.
    """

    name: ClassVar[str] = "toy"
    files: ClassVar[tuple[str, ...]] = ("file",)

    text: str
    file: str | None = None
    seconds: float = 0.0
    do: Literal[
        "write", "segfault", "hang", "hold", "memory", "crowd", "fill", "raise", "once", "killed", "link", "nothing"
    ] = "write"
    marker: str | None = None

    @classmethod
    def check(cls, methods: Any) -> None:
        if methods:
            raise ValueError("a toy follows no recipe; leave it away")

    @classmethod
    def load(cls, model: Path | None, device: str) -> Any:
        return None

    @classmethod
    def run(
        cls, host: Any, methods: Any, jobs: Sequence["Toy"], seeds: Sequence[int], stems: Sequence[Path]
    ) -> list[dict[str, Any]]:
        if sum(job.do == "crowd" for job in jobs) > MEMORY:
            raise MemoryError("a crowd of toys")
        company = hashlib.sha256(repr([(job.text, seed) for job, seed in zip(jobs, seeds, strict=True)]).encode())
        for place, (job, stem) in enumerate(zip(jobs, stems, strict=True)):
            time.sleep(job.seconds)
            job.misbehave(stem)
            if job.do != "nothing":
                Path(f"{stem}.txt").write_text(f"{job.text} {seeds[place]} {place} {company.hexdigest()}")
        return [{"spent": {"toys": 1}} for _ in jobs]

    def misbehave(self, stem: Path) -> None:
        if self.do == "segfault":
            ctypes.string_at(0)
        elif self.do == "hang":
            time.sleep(1000)
        elif self.do == "hold":
            ctypes.PyDLL(None).sleep(1000)
        elif self.do == "memory":
            raise MemoryError("one toy too large")
        elif self.do == "fill":
            Path(f"{stem}.bin").write_bytes(bytes(50_000_000))
        elif self.do == "raise":
            raise RuntimeError("a broken toy")
        elif self.do == "link":
            Path(f"{stem}.link").symlink_to("/etc/passwd")
        elif self.do == "killed" or (self.do == "once" and not Path(str(self.marker)).exists()):
            if self.marker:
                Path(self.marker).touch()
            os.kill(os.getpid(), 9)
