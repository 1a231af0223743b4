"""A pass as text and back: `name` or `name{knob=value,layers=0+1+2}`."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from rewriter.engine.rewrite_pass import RewritePass
from rewriter.errors import ConfigError

__all__ = ["format_default", "format_spec", "knobs", "parse_spec"]

_SPEC = re.compile(r"^(?P<name>[a-z0-9][a-z0-9-]*)(?:\{(?P<knobs>.*)\})?$")


def format_spec(rewrite: RewritePass) -> str:
    """The shortest text that parses back to this pass: knobs at their defaults are left out."""
    given = [
        f"{field.name}={_format(getattr(rewrite, field.name))}"
        for field in dataclasses.fields(rewrite)
        if getattr(rewrite, field.name) != field.default
    ]
    return f"{rewrite.name}{{{','.join(given)}}}" if given else rewrite.name


def parse_spec(text: str, table: Mapping[str, type[RewritePass]]) -> RewritePass:
    """The pass that a text stands for.

    Raises:
        ConfigError: malformed text, an unknown pass or knob, or a value of the wrong type or range.
    """
    found = _SPEC.match(text.strip())
    if found is None:
        raise ConfigError("passes", text, "NAME or NAME{knob=value,...}")
    name = found["name"]
    if name not in table:
        raise ConfigError("passes", name, _one_of(name, table))
    kind = table[name]
    types_of = knobs(kind)
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in (found["knobs"] or "").split(","))):
        knob, separator, value = (part.strip() for part in item.partition("="))
        if not separator:
            raise ConfigError(name, item, "knob=value")
        if knob not in types_of:
            raise ConfigError(f"{name} knob", knob, _one_of(knob, types_of))
        if knob in values:
            raise ConfigError(f"{name}.{knob}", value, "given once")
        values[knob] = _parse(f"{name}.{knob}", value, types_of[knob])
    return kind(**values)


def knobs(kind: type[RewritePass]) -> dict[str, Any]:
    """Knob names and their types."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def format_default(field: dataclasses.Field[Any]) -> str:
    """A knob's default as it is written in a spec."""
    return _format(field.default)


def _one_of(given: str, allowed: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(given, allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"one of {', '.join(sorted(allowed))}{hint}"


def _format(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "+".join(str(item) for item in value)
    return "none" if value is None else str(value)


def _parse(field: str, text: str, kind: Any) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in options and text == "none":
        return None
    chosen = next(option for option in options if option is not type(None))
    try:
        if typing.get_origin(chosen) is tuple:
            return tuple(int(item) for item in text.split("+"))
        if chosen is bool:
            return {"true": True, "false": False}[text]
        return chosen(text)
    except (KeyError, ValueError):
        raise ConfigError(field, text, _expected(chosen)) from None


def _expected(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return "integers joined with +"
    return {bool: "true or false", int: "an integer", float: "a number"}.get(kind, "text")
