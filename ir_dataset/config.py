"""A corpus on one page: the TOML file that `rewriter ir run` reads."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from rewriter.errors import ConfigError

__all__ = [
    "BuildOptions",
    "Config",
    "LabelOptions",
    "SourceTable",
    "load_config",
    "parse_config",
    "shipped",
]

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=0)]


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file: unknown keys are errors."""


class BuildOptions(_Table, frozen=True):
    """`[build]`: what one package may take."""

    wall_s: Positive = 900.0
    unit_s: Positive = 120.0
    memory_gib: Positive = 4.0
    disk_gib: Positive = 8.0
    jobs: Annotated[int, Meta(ge=1, le=256)] = 1
    """Processes within one build; packages are built beside each other by `--jobs`."""


class LabelOptions(_Table, frozen=True):
    """`[label]`: which kept modules get labels; making them costs more than all else but building."""

    max_modules: Count = 2000
    max_modules_per_project: Count = 150
    timeout_s: Positive = 120.0


class SplitOptions(_Table, frozen=True):
    """`[split]`: shares of project families, and the language that only the test set has."""

    train: Annotated[float, Meta(gt=0, lt=1)] = 0.8
    validation: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    held_out_language: str = "zig"


class TokenOptions(_Table, frozen=True):
    """`[tokens]`: the byte-pair vocabulary trained on the training split's text."""

    vocabulary: Annotated[int, Meta(ge=300, le=1_000_000)] = 10_000
    train_text_mib: Positive = 32.0
    max_modules: Count = 2000
    """Modules that are counted and embedded; a sample by hash where there are more."""


class Config(_Table, frozen=True, kw_only=True):
    """The whole file."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    seed: int = 0
    license_tier: Annotated[str, Meta(pattern="^[ab]$")] = "b"
    """Most permissive tiers that are packed: `a` is ComPile's four licences, `b` adds others."""
    allow_newer_writers: bool = False
    """Keep IR of a writer whose LLVM is newer than the reader's where it can be read."""
    build: BuildOptions = BuildOptions()
    label: LabelOptions = LabelOptions()
    split: SplitOptions = SplitOptions()
    tokens: TokenOptions = TokenOptions()
    source: Annotated[tuple[dict[str, Any], ...], Meta(min_length=1)]


class SourceTable(msgspec.Struct, frozen=True):
    """One `[[source]]`: the plug-in's name and what is for it."""

    kind: str
    options: dict[str, Any]
    line: int


def shipped(name: str) -> Path:
    """The path of a corpus file: `name` itself, or that of one that comes with the package."""
    inside = Path(__file__).parent / "corpora" / f"{name}.toml"
    return inside if re.fullmatch(r"[a-z-]+", name) and inside.is_file() else Path(name)


def load_config(path: Path) -> tuple[Config, tuple[SourceTable, ...]]:
    """Read a corpus file.

    Relative `path` options of sources are taken from the file's own directory.

    Raises:
        ConfigError: there is no such file, it is not TOML, or a key is unknown or has a value that is
            not allowed; names the file, the line and the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("config", str(path), f"a readable TOML file ({error})") from error
    return parse_config(text, name=str(path), directory=path.parent)


def parse_config(
    text: str, *, name: str = "config", directory: Path = Path()
) -> tuple[Config, tuple[SourceTable, ...]]:
    """As `load_config`, from text."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(name, "…", f"TOML ({error})") from error
    try:
        config = msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at ")
        field = _field(message, place.strip("`"))
        raise ConfigError(
            f"{name}:{line_of(text, field)}: {field}", _at(values, field), message
        ) from error
    if config.split.train + config.split.validation >= 1:
        field = "split.validation"
        at = f"{name}:{line_of(text, field)}: {field}"
        raise ConfigError(
            at, config.split.validation, "below 1 - split.train, so that a test set remains"
        )
    tables = [
        _source_table(table, f"source[{index}]", text, name, directory)
        for index, table in enumerate(config.source)
    ]
    return config, tuple(tables)


def _source_table(
    table: dict[str, Any], field: str, text: str, name: str, directory: Path
) -> SourceTable:
    from ir_dataset.sources import SOURCES

    line = line_of(text, field)
    kind = table.get("kind")
    if kind not in SOURCES:
        at = f"{name}:{line_of(text, f'{field}.kind')}: {field}.kind"
        raise ConfigError(at, kind, f"one of {', '.join(sorted(SOURCES))}")
    options = {key: value for key, value in table.items() if key != "kind"}
    if isinstance(options.get("path"), str):
        options["path"] = os.path.normpath(
            directory.absolute() / Path(options["path"]).expanduser()
        )
    return SourceTable(kind=kind, options=options, line=line)


def _field(message: str, place: str) -> str:
    """`build.wall_s` from `$.build.wall_s`; an unknown or missing key is part of the message."""
    field = place.removeprefix("$").removeprefix(".")
    named = re.search(r"unknown field `([^`]*)`", message)
    if named:
        field = f"{field}.{named.group(1)}" if field else named.group(1)
    return field


def _at(values: Any, field: str) -> Any:
    """The value at a dotted path, or None."""
    for part in re.findall(r"[^.\[\]]+", field):
        try:
            values = values[int(part)] if isinstance(values, list) else values[part]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return values


def line_of(text: str, field: str) -> int:
    """The line, from 1, where a dotted path such as `source[1].kind` is set; else its table's."""
    if field.endswith("]"):
        table, key = field, ""
    else:
        table, _, key = field.rpartition(".")
    name, _, number = table.rstrip("]").partition("[")
    nth = int(number or 0)
    here, seen, start = not name, -1, 1
    for line_number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\[?\s*([\w.-]+)\s*\]", line)
        if header and header.group(1) == field:
            return line_number
        if header:
            seen += header.group(1) == name
            here = header.group(1) == name and seen == nth
            start = line_number if here else start
        elif here and key and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return line_number
    return start
