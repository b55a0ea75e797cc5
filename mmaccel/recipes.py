"""Recipes: a list of methods as a JSON or YAML file."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmaccel.methods import Method, method_from_dict


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> list[Method]:
    """Reads a list of method dictionaries (or a single one) from a .json, .yaml or .yml file.

    overrides: settings written "name=value" (every method that has the setting takes it) or "method.name=value".
    Raises FileNotFoundError, or ValueError that names the file and what is wrong in it.
    """
    path = Path(path)
    try:
        return recipe_from_data(read_recipe(path), overrides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def save_recipe(methods: Iterable[Method], path: str | Path) -> None:
    """Writes the methods as a JSON or YAML list, by the file's ending."""
    import yaml

    path = Path(path)
    data = [method.to_dict() for method in methods]
    text = json.dumps(data, indent=2) + "\n" if _is_json(path) else yaml.safe_dump(data, sort_keys=False)
    path.write_text(text)


def read_recipe(path: Path) -> Any:
    """The plain data of a recipe file; no method is built.  Raises FileNotFoundError or ValueError."""
    import yaml

    as_json = _is_json(path)
    text = path.read_text()
    try:
        return json.loads(text) if as_json else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"not readable as {'JSON' if as_json else 'YAML'}: {error}") from None


def recipe_from_data(data: Any, overrides: Sequence[str] = ()) -> list[Method]:
    """The methods that plain data describes: a mapping, or a list of them."""
    entries = [data] if isinstance(data, dict) else data
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'a recipe is a list of methods, e.g. [{{"method": "hired", "budget": 0.2}}]; got {data!r}')
    methods = [method_from_dict(entry) for entry in entries]
    for override in overrides:
        methods = _override(methods, override)
    return methods


def method_from_settings(name: str, settings: Sequence[str] = (), **given: Any) -> Method:
    """The method called `name` with settings written "name=value", e.g. "budget=0.3", and with those given."""
    import yaml

    data = dict(given)
    for setting in settings:
        key, text = name_and_value(setting)
        data[key.removeprefix(f"{name}.")] = yaml.safe_load(text)
    return method_from_dict({"method": name, **data})


def name_and_value(text: str, what: str = "a setting", example: str = "budget=0.3") -> tuple[str, str]:
    """The two sides of "name=value".  Raises ValueError, with the example, if there is no "="."""
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"{what} is written name=value, e.g. {example}; got {text!r}")
    return name, value


def _override(methods: list[Method], override: str) -> list[Method]:
    import yaml

    key, text = name_and_value(override)
    wanted, _, name = key.rpartition(".")
    value = yaml.safe_load(text)
    changed, hits = [], 0
    for method in methods:
        data = method.to_dict()
        if name in data and name not in ("method", "version") and wanted in ("", method.name):
            method, hits = type(method).from_dict({**data, name: value}), hits + 1
        changed.append(method)
    if not hits:
        names = sorted({key for method in methods for key in method.to_dict()} - {"method", "version"})
        raise ValueError(f"no method of the recipe has a setting {key!r}; settings: {', '.join(names)}")
    return changed


def _is_json(path: Path) -> bool:
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"a recipe is a .json, .yaml or .yml file; got {path.name!r}")
    return path.suffix == ".json"
