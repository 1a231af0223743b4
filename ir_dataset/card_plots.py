"""The pictures of a card: tokens, instructions, sizes, duplicates and licences by language."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.errors import ArtifactError

__all__ = ["OPCODE_GROUPS", "draw_plots"]

OPCODE_GROUPS: dict[str, tuple[str, ...]] = {
    "load": ("load",),
    "store": ("store", "store_const"),
    "alloca": ("alloca",),
    "address": ("gep_const", "gep_var"),
    "call": ("call_direct", "call_indirect", "call_asm", "invoke"),
    "branch": ("br", "br_cond", "switch", "ret", "unreachable"),
    "compare": ("icmp", "fcmp"),
    "integer": ("add", "mul", "div", "shift", "logic"),
    "float": ("fp_arith", "fp_div"),
    "cast": ("cast_free", "cast_ext", "cast_fp"),
    "phi, select": ("phi", "select"),
}
"""Instruction classes of `ir_dataset.instruction_classes` under the names that the picture has."""

_TIERS = ("a", "b", "c", "none")
_MOST_LICENSES = 7
Draw = Callable[[Any], None]


def draw_plots(directory: Path, summary: dict[str, Any]) -> list[dict[str, str]]:
    """Title and PNG (base64) of each picture; one whose numbers the dataset lacks is left out.

    Raises:
        ArtifactError: a table of the dataset is missing or damaged.
    """
    languages = list(summary["languages"])
    functions = _functions(directory / "functions.parquet")
    modules = _modules(directory / "data")
    lengths = {"": functions["n_instructions"]}
    sizes = {name: functions[name] for name in sorted(functions) if name.startswith("size_")}
    plots: list[tuple[str, Draw | None]] = [
        ("Modules seen and packed", lambda axes: _seen(axes, summary, languages)),
        ("Duplicate functions", lambda axes: _duplicates(axes, summary, languages)),
        ("Length of functions", _densities(lengths, functions, languages, "instructions")),
        ("Machine code of functions", _densities(sizes, functions, languages, "bytes")),
        (
            "Tokens of modules",
            _densities({"": modules["n_tokens_bpe"]}, modules, languages, "tokens"),
        ),
        ("Instructions, as written", _opcodes(functions, languages)),
        ("Licence tiers", lambda axes: _tiers(axes, summary, languages)),
        ("Licences of packed modules", _licenses(modules, languages)),
    ]
    return [{"title": title, "png": _png(draw)} for title, draw in plots if draw]


def _png(draw: Draw) -> str:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return base64.b64encode(stream.getvalue()).decode()


# --- tables ------------------------------------------------------------------------------------


def _functions(path: Path) -> dict[str, NDArray[Any]]:
    """Columns by name: language, length, sizes, and counts of instruction classes where there are any."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    counted = {f"feature_{name}" for group in OPCODE_GROUPS.values() for name in group}
    try:
        there = pq.read_schema(path).names
        wanted = [name for name in there if name in counted or name.startswith("size_")]
        table = pq.read_table(path, columns=["language", "n_instructions", *wanted])
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(f"{path}: not a table of functions: {error}") from error
    return {name: _array(table[name]) for name in table.column_names}


def _modules(place: Path) -> dict[str, NDArray[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["language", "license_expression", "n_tokens_bpe"]
    try:
        tables = [pq.read_table(path, columns=names) for path in sorted(place.rglob("*.parquet"))]
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(f"{place}: a table of modules is damaged: {error}") from error
    if not tables:
        raise ArtifactError(f"{place}: no table of modules")
    joined = pa.concat_tables(tables)
    return {name: _array(joined[name]) for name in names}


def _array(column: Any) -> NDArray[Any]:
    """Texts as texts, numbers as float64 with NaN where there is none."""
    import pyarrow as pa

    if pa.types.is_string(column.type):
        return np.array(column.to_pylist(), dtype=str)
    return column.cast(pa.float64()).to_numpy()


# --- pictures ------------------------------------------------------------------------------------


def _seen(axes: Any, summary: dict[str, Any], languages: Sequence[str]) -> None:
    counts = summary["languages"]
    axes.bar(languages, [counts[one]["units"] for one in languages], label="seen")
    kept = [counts[one].get("kept_modules", 0) for one in languages]
    axes.bar(languages, kept, label="packed", width=0.5)
    axes.set(yscale="log", ylabel="modules")
    axes.legend(frameon=False)


def _duplicates(axes: Any, summary: dict[str, Any], languages: Sequence[str]) -> None:
    """Of the functions that were read: packed, and of these the first of their normalised text."""
    counts = summary["languages"]
    place = np.arange(len(languages))
    for at, (key, label) in enumerate(
        (("functions", "read"), ("kept_functions", "packed"), ("unique_functions", "unique"))
    ):
        values = [counts[one].get(key, 0) for one in languages]
        axes.bar(place + (at - 1) * 0.27, values, 0.25, label=label)
    axes.set_xticks(place, languages)
    axes.set(yscale="log", ylabel="functions")
    axes.legend(frameon=False)


def _densities(
    columns: dict[str, NDArray[Any]],
    table: dict[str, NDArray[Any]],
    languages: Sequence[str],
    unit: str,
) -> Draw | None:
    """Of each language and column, on logarithmic axes; None where no number is positive."""
    found = [
        (f"{language} {name.removeprefix('size_')}".strip(), values[chosen])
        for language in languages
        for name, values in columns.items()
        if (chosen := (table["language"] == language) & (np.nan_to_num(values) > 0)).any()
    ]
    if not found:
        return None
    most = max(values.max() for _, values in found)

    def draw(axes: Any) -> None:
        bins = np.logspace(0, np.log10(max(most, 10.0)), 50)
        for at, (label, values) in enumerate(found):
            color, style = f"C{at // len(columns)}", "-:"[at % len(columns) % 2]
            axes.hist(
                values, bins, histtype="step", label=label, density=True, color=color, ls=style
            )
        axes.set(xscale="log", yscale="log", xlabel=unit, ylabel="density")
        axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))

    return draw


def _opcodes(functions: dict[str, NDArray[Any]], languages: Sequence[str]) -> Draw | None:
    if "feature_load" not in functions:
        return None
    shares = {}
    for language in languages:
        chosen = (functions["language"] == language) & ~np.isnan(functions["feature_load"])
        total = functions["n_instructions"][chosen].sum()
        if total:
            shares[language] = [
                sum(np.nansum(functions[f"feature_{name}"][chosen]) for name in group) / total
                for group in OPCODE_GROUPS.values()
            ]
    if not shares:
        return None

    def draw(axes: Any) -> None:
        place, width = np.arange(len(OPCODE_GROUPS)), 0.8 / len(shares)
        for at, (language, values) in enumerate(shares.items()):
            axes.bar(place + at * width, values, width, label=language)
        axes.set_xticks(place + 0.4 - width / 2, list(OPCODE_GROUPS), rotation=35, ha="right")
        axes.set_ylabel("share of instructions")
        axes.legend(frameon=False, fontsize="small")

    return draw


def _tiers(axes: Any, summary: dict[str, Any], languages: Sequence[str]) -> None:
    rows = {
        tier: [summary["tiers"].get(one, {}).get(tier, 0) for one in languages] for tier in _TIERS
    }
    _stacked(axes, languages, rows, "share of units", "tier")


def _licenses(modules: dict[str, NDArray[Any]], languages: Sequence[str]) -> Draw:
    """Of the packed modules: the expressions that most have, and all others as one."""
    pairs = list(zip(modules["language"], modules["license_expression"], strict=True))
    common = [name for name, _ in Counter(name for _, name in pairs).most_common(_MOST_LICENSES)]
    counts = Counter((one, name if name in common else "others") for one, name in pairs)
    names = [*common, *(["others"] if any(name == "others" for _, name in counts) else [])]
    rows = {_short(name): [counts[one, name] for one in languages] for name in names}
    return lambda axes: _stacked(axes, languages, rows, "share of modules", "")


def _short(name: str) -> str:
    return name if len(name) <= 34 else name[:31] + "…"


def _stacked(
    axes: Any, languages: Sequence[str], rows: Mapping[str, Sequence[int]], label: str, title: str
) -> None:
    """Shares of each language, which add up to 1 where there is anything."""
    table = {name: np.array(values, float) for name, values in rows.items()}
    total = np.maximum(sum(table.values(), np.zeros(len(languages))), 1)
    bottom = np.zeros(len(languages))
    for name, values in table.items():
        axes.bar(languages, values / total, bottom=bottom, label=name)
        bottom = bottom + values / total
    axes.set(ylabel=label, ylim=(0, 1))
    axes.legend(
        title=title or None,
        frameon=False,
        fontsize="small",
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )
