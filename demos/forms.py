"""Methods as forms, made of the registry and of each method's JSON schema: a method that is installed appears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from mmaccel.methods import Method, get_method, list_methods
from mmaccel.registry import entries

OWN = "settings of your own"
LETTERS = 4000  # of the settings
PLAIN = {"integer": "whole number", "number": "number", "boolean": "true | false", "null": "null"}


def methods_of(stage: str) -> list[str]:
    """The methods whose models are loaded as those of this stage are, and that need no more than a reward."""
    loaders = entries("mmaccel.loaders")

    def suits(method: type[Method]) -> bool:
        loader = loaders.get(method.stages[0])
        required = method.json_schema().get("required", [])
        return loader is not None and loader.value == loaders[stage].value and set(required) <= {"reward"}

    return [name for name in list_methods() if suits(get_method(name))]


@dataclass(frozen=True)
class Form:
    """What the page asks for a method, beside the method itself.

    knob: the setting that has a slider of its own ("budget", "nfe").  held: settings that the page fixes.
    """

    knob: str
    held: tuple[str, ...] = ()

    def presets(self, name: str) -> list[str]:
        """What may be chosen as a start."""
        return [OWN, *get_method(name).presets]

    def has_knob(self, name: str, preset: str) -> bool:
        """Whether the slider counts: a preset says all by itself."""
        return preset == OWN and self.knob in get_method(name).json_schema()["properties"]

    def text(self, name: str, preset: str) -> str:
        """The settings as YAML, a line each with what it may be; those of a preset, or the defaults."""
        method = get_method(name)
        given: Mapping[str, Any] = method.presets.get(preset, {})
        lines = []
        for key, schema in method.json_schema()["properties"].items():
            if not self._asked(key, schema) or (self.has_knob(name, preset) and key == self.knob):
                continue
            value = given.get(key, schema.get("default"))
            written = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
            lines.append(f"{key}: {written}  # {in_words(schema)}")
        return "\n".join(lines) + "\n"

    def method(self, name: str, preset: str, knob: float, text: str, **held: Any) -> Method:
        """The method that the form describes; a preset brings what no form asks for, such as a file of weights.

        Raises ValueError for settings that are none, or not the page's.
        """
        method = get_method(name)
        properties = method.json_schema()["properties"]
        settings = parsed(text)
        for key in settings:
            if key in properties and not self._asked(key, properties[key]):
                raise ValueError(f"the setting {key} of {name} is not set here")
        if self.has_knob(name, preset):
            settings = {self.knob: knob, **settings}
        for key, value in method.presets.get(preset, {}).items():
            if not in_words(properties[key]):
                settings[key] = value
        return method.from_dict({**settings, **{key: value for key, value in held.items() if key in properties}})

    def _asked(self, key: str, schema: Mapping[str, Any]) -> bool:
        return key not in self.held and in_words(schema) != ""


def parsed(text: str) -> dict[str, Any]:
    """Settings written in YAML.  Raises ValueError for anything but a mapping of reasonable length."""
    if len(text) > LETTERS:
        raise ValueError(f"the settings have at most {LETTERS} letters; got {len(text)}")
    try:
        if any(isinstance(token, yaml.AliasToken | yaml.AnchorToken) for token in yaml.scan(text)):
            raise ValueError("the settings are plain YAML, without anchors and aliases")
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"the settings are no YAML: {' '.join(str(error).split())[:200]}") from None
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"the settings are lines such as `alpha: 0.5`; got {str(found)[:80]!r}")
    return found


def in_words(schema: Mapping[str, Any]) -> str:
    """What a value may be, in a few words; nothing for what is more than plain data, such as a reference or a path."""
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if "anyOf" in schema:
        parts = [in_words(one) for one in schema["anyOf"] if "$ref" not in one]
        return " | ".join(parts) if all(parts) else ""
    if schema.get("type") == "array":
        items = schema.get("prefixItems") or [schema.get("items", {})]
        words = in_words(items[0])
        return f"list of {words}s" if words else ""
    return PLAIN.get(schema.get("type", ""), "")
