"""What a method is: a frozen, typed, serialisable dataclass that can be attached to a target.

The same dictionary, `{"method": "hired", "version": 1, "budget": 0.2}`, serves Python, recipes, the command line and
result files.  Methods are found through the entry-point group `mmaccel.methods`; nothing is imported until named.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mmaccel.plain_data import Described, adapter, build
from mmaccel.registry import entries, find_class, suggest

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from mmaccel.checks import LawResult

STAGES = ("frames", "vision", "prefill", "decoder", "kv_cache", "denoise", "sample", "execute")
"""Where methods act, in the order of the data's way."""


class Method(Described):
    """Base class of every method.  Subclasses are frozen, keyword-only dataclasses; their fields are the settings."""

    version: ClassVar[int] = 1
    stages: ClassVar[tuple[str, ...]]
    beside: ClassVar[tuple[str, ...]] = ()
    """Those of its stages on which the method may stand beside one other method."""
    knob: ClassVar[str | None] = "budget"
    """The one setting that a call's cost grows with, for `mmaccel.tune`; None if there is none."""
    knob_range: ClassVar[tuple[float, float]] = (0.01, 1.0)
    needs_processor: ClassVar[bool] = True
    """Whether `example` makes its call with a processor; pipelines and models of tokens have none."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings that a paper recommends, by the model that they are for."""

    def knob_range_on(self, target: Any) -> tuple[float, float]:
        """The values that the knob may take on this target."""
        return self.knob_range

    @abstractmethod
    def attach(self, target: Any, attachment: Attachment) -> None:
        """Changes `target` through `attachment` only.  Raises `Unsupported` if it cannot handle the target."""

    def laws(self, target: Any, inputs: Mapping[str, Any]) -> Iterable[LawResult]:
        """The laws that prove the method right, measured on the plain `target` called with `inputs`."""
        raise Unsupported(f"{self.name} brings no laws to check")

    def example(self, target: Any, processor: Any) -> dict[str, Any]:
        """The arguments of a typical call of `target`, made with its processor."""
        raise Unsupported(f"{self.name} brings no example; pass inputs")

    def to_dict(self) -> dict[str, Any]:
        """The method as plain data; `from_dict` gives back an equal method."""
        fields: dict[str, Any] = adapter(type(self)).dump_python(self, mode="json")
        return {"method": self.name, "version": self.version, **fields}

    def described(self) -> dict[str, Any]:
        """As `to_dict`, for reading only: a setting that cannot be written down (a lambda) stands as its repr."""
        try:
            return self.to_dict()
        except ValueError:
            fields = dataclasses.fields(self)  # type: ignore[arg-type]  # subclasses are dataclasses
            settings = {field.name: repr(getattr(self, field.name)) for field in fields}
            return {"method": self.name, "version": self.version, **settings}

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The method with a preset's settings, some of them changed.  Raises ValueError, naming the nearest preset."""
        return cls.from_dict({"preset": name, **changes})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Builds the method from its plain data; settings beside a "preset" change it.

        Raises ValueError for unknown keys (naming the nearest), values of the wrong type and other versions.
        """
        settings = dict(data)
        given_name, given_version = settings.pop("method", cls.name), settings.pop("version", cls.version)
        if given_name != cls.name:
            raise ValueError(f"this is method {cls.name!r}, but the data is for {given_name!r}")
        if given_version != cls.version:
            raise ValueError(f"{cls.name} is at version {cls.version}; the data says version {given_version!r}")
        if (preset := settings.pop("preset", None)) is not None:
            if preset not in cls.presets:
                raise ValueError(f"{cls.name} has no preset {preset!r}; {suggest(str(preset), cls.presets)}")
            settings = {**cls.presets[preset], **settings}
        return build(cls, "method", cls.name, settings)


class Unsupported(ValueError):
    """A target, family or setting that a method cannot handle; says what was given, what works, and the mend."""


def list_methods() -> list[str]:
    """The names of all installed methods, ours and third parties', sorted.  Imports none of them."""
    return sorted(entries("mmaccel.methods"))


def get_method(name: str) -> type[Method]:
    """The class of the method called `name`.  Raises ValueError, naming the nearest, if there is none."""
    return find_class("mmaccel.methods", name, Method)  # type: ignore[type-abstract]  # its subclasses are not


def method_from_dict(data: Mapping[str, Any]) -> Method:
    """The method that `data` describes, found by its name under the key "method"."""
    if not isinstance(data, Mapping) or "method" not in data:
        raise ValueError(f'a method is a mapping with a key "method", e.g. {{"method": "hired"}}; got {data!r}')
    return get_method(str(data["method"])).from_dict(data)


def in_order(methods: Iterable[Method]) -> tuple[Method, ...]:
    """The methods in the order of the data's way.  Raises ValueError if two of them fight over one stage."""
    ordered = sorted(methods, key=lambda method: (STAGES.index(method.stages[0]), bool(method.beside)))
    for index, first in enumerate(ordered):
        for second in ordered[index + 1 :]:
            if shared := set(first.stages) & set(second.stages) - {*first.beside, *second.beside}:
                raise ValueError(
                    f"{first.name} and {second.name} both act on the stage {min(shared)!r}, and only one method can; "
                    f"apply one of them, or take the other off first with mmaccel.remove"
                )
    return tuple(ordered)
