"""The method that lets a vision-language model see the few frames of a video that matter."""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from mmaccel.attachment import Attachment
from mmaccel.methods import Method
from mmaccel.named import resolve
from video.dense import Uniform
from video.detectors import Detector, DetectorField
from video.film import Film
from video.finding import Keyframes, find_keyframes, most_frames
from video.grounding import Grounding, GroundingField
from video.search import FrameSearch, SearchField

if TYPE_CHECKING:
    from mmaccel.checks import LawResult


@dataclass(frozen=True)
class KeyframeSearch(Method):
    """Searches a video for the frames that answer the question, and hands them to the model as pictures.

    It decorates a processor, for a model never sees the file.  search, detector, grounding: objects, names or
    dictionaries.  frames: how many to choose.  budget: the most frames that the detector may look at, a share of the
    video's seconds or a whole number.  targets, cues: what to look for; where no target is given, what the grounding
    makes of the question, and where that is nothing, evenly spaced frames (the report says so).  looks: the shorter
    side, in pixels, of what the detector sees; short: of the frames that the model gets, None as in the file.  stamp:
    what is written before every frame in a chat, with its time as {seconds}; empty for nothing.
    """

    name: ClassVar[str] = "keyframes"
    stages: ClassVar[tuple[str, ...]] = ("frames",)
    needs_processor: ClassVar[bool] = False  # its target is one

    search: SearchField = "tstar"
    detector: DetectorField = field(default="colour-shape", kw_only=True)
    frames: int = field(default=8, kw_only=True)
    budget: int | float = field(default=0.5, kw_only=True)
    targets: Sequence[str] = field(default=(), kw_only=True)
    cues: Sequence[str] = field(default=(), kw_only=True)
    grounding: GroundingField = field(default="words", kw_only=True)
    looks: int = field(default=96, kw_only=True)
    short: int | None = field(default=None, kw_only=True)
    stamp: str = field(default="[{seconds:.1f} s]", kw_only=True)

    def __post_init__(self) -> None:
        for name in ("targets", "cues"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is a list of phrases; for one phrase write {name}=[{getattr(self, name)!r}]")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, base in (("search", FrameSearch), ("detector", Detector), ("grounding", Grounding)):
            object.__setattr__(self, name, resolve(getattr(self, name), base))
        if self.frames < 1:
            raise ValueError(f"at least one frame is to be chosen; got frames={self.frames}")
        most_frames(self.budget, 1)
        try:
            self.stamp.format(seconds=1.0)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f'a stamp may hold {{seconds}}, e.g. "[{{seconds:.1f}} s]"; got {self.stamp!r} ({error!r})'
            ) from None

    def find(self, film: Film, question: str = "") -> tuple[Keyframes, tuple[str, ...], tuple[str, ...]]:
        """The keyframes for a question, and the targets and cues that were looked for."""
        targets, cues = tuple(self.targets), tuple(self.cues)
        if not targets:
            targets, cues = self.grounding(question, film)
        search = self.search if targets else Uniform()
        found = find_keyframes(
            film, search, self.detector, targets, cues, frames=self.frames, budget=self.budget, short=self.short
        )
        return found, tuple(targets), tuple(cues)

    def laws(self, target: Any, inputs: Mapping[str, Any]) -> Iterable[LawResult]:
        from video.laws import keyframe_laws

        yield from keyframe_laws(target, self, inputs)

    def example(self, target: Any, processor: Any) -> dict[str, Any]:
        """A minute of the pocket world, in a temporary folder that goes when Python ends, and a question about it."""
        from video.pocket_haystack import make

        folder = TemporaryDirectory(prefix="mmaccel-")
        atexit.register(folder.cleanup)
        film = make(Path(folder.name) / "film.mp4", seconds=60)
        return {"text": f"<video> {film.events[0].question}", "videos": str(film.path)}

    def attach(self, target: Any, attachment: Attachment) -> None:
        from video.processors import decorate

        decorate(self, target, attachment)
