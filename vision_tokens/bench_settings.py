"""What a bench of visual-token methods compares: one method by name, or several that act together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from mmaccel.methods import Method, get_method
from vision_tokens.cache_methods import CacheMethod
from vision_tokens.decoder_layers import DecoderMethod
from vision_tokens.language_input import LanguageInputMethod

WITH_ORACLE = (LanguageInputMethod, DecoderMethod, CacheMethod)
"""The kinds of methods that decide which tokens each layer of the language model works on, or holds."""


def methods_named(name: str, budget: float) -> list[Method]:
    """The methods of NAME, or of several names with + between, each with a budget of its own or this one.

    A NAME may be followed by :PRESET, whose own share the budget takes the place of, and by @BUDGET, as in
    "tome@0.5+hired+prefix-kv@0.5".  Raises ValueError for unknown methods, and for budgets that are no numbers.
    """
    return [_method(part, budget) for part in name.split("+")]


def has_oracle(methods: Sequence[Method]) -> bool:
    """Whether `vision_tokens.oracle` can be measured beside these: it pays the plain vision encoder."""
    return all(isinstance(method, WITH_ORACLE) and "vision" not in method.stages for method in methods)


def _method(name: str, budget: float) -> Method:
    name, _, own = name.partition("@")
    name, _, preset = name.partition(":")
    if own:
        try:
            budget = float(own)
        except ValueError:
            raise ValueError(f"a budget is a number, as in {name}@0.5; got {own!r}") from None
    if not preset:
        return get_method(name).from_dict({"budget": budget})
    chosen: Any = get_method(name).preset(preset)
    shares = {"kept_share", "ratio", "table", "ramp"} & {field.name for field in fields(chosen)}
    method: Method = replace(chosen, **dict.fromkeys(shares), budget=budget)
    return method
