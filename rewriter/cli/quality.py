"""`rewriter quality`: options in, a table, JSON or a picture out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from rewriter.cli.console import out
from rewriter.errors import ConfigError, ModelError
from rewriter.quality.report import QualityReport, Result
from rewriter.report.files import write_file

__all__ = [
    "check_plotting",
    "load_with_tokenizer",
    "parse_densities",
    "parse_names",
    "show",
    "write",
]


def parse_densities(text: str | None) -> tuple[float, ...]:
    """Shares from percentages such as "12.5,25,50,100". Raises ConfigError."""
    if text is None:
        return ()
    try:
        found = tuple(float(part) / 100 for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < share <= 1 for share in found):
        raise ConfigError("densities", text, "percentages above 0, at most 100, joined by commas")
    return found


def parse_names(text: str) -> tuple[str, ...]:
    """Names joined by commas; none for an empty text."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def load_with_tokenizer(directory: str) -> tuple[Any, Any]:
    """Model and tokenizer of a Hugging Face directory. Raises ModelError."""
    from transformers import AutoTokenizer

    from rewriter.capture.sources import load_model

    model = load_model(directory)
    if not Path(directory).is_dir():
        raise ModelError(f"{directory} has no tokenizer; quality needs a Hugging Face directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever the library and the file formats raise
        first = (str(error).splitlines() or [""])[0]
        raise ModelError(f"cannot read the tokenizer in {directory}: {first}") from error
    return model, tokenizer


def check_plotting() -> None:
    """Raises ConfigError where pictures cannot be drawn, before the long work starts."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plot", "matplotlib", "installed: pip install 'rewriter[quality]'")


def write(report: QualityReport, output: Path | None, plot: Path | None) -> None:
    """The files that were asked for, each all or nothing."""
    if output is not None:
        write_file(output, json.dumps(report.to_json(), indent=1).encode(), "output")
    if plot is not None:
        from rewriter.quality.plots import draw

        write_file(plot, draw(report), "plot")


def show(report: QualityReport) -> None:
    """One table for each source and one for the tasks."""
    first = report.results[0]
    for source in first.fidelity:
        out.print(_fidelity_table(source, report.results))
    if first.accuracy:
        out.print(_accuracy_table(report.results))
    for result in report.results:
        for reason in result.undone:
            out.print(f"{result.label}: undone: {reason}", markup=False)


def _fidelity_table(source: str, results: list[Result]) -> Table:
    title = f"{source}: distance from the original, token by token"
    headings = ("KL", "KL p99", "agree", "perplexity", "prefix", "mass/oracle")
    table = _table(title, headings)
    for result in results:
        f = result.fidelity[source]
        mass = "" if f.mass is None else f"{f.mass.variant:.2f}/{f.mass.oracle:.2f}"
        table.add_row(
            result.label,
            _bytes(result.state_bytes[source]),
            f"{f.kl_mean:.2g}",
            f"{f.kl_p99:.2g}",
            f"{100 * f.agreement:.1f} %",
            f"{f.perplexity:.2f}",
            f"{f.common_prefix:.0f}",
            mass,
        )
    return table


def _accuracy_table(results: list[Result]) -> Table:
    columns = [(task, mode) for task, modes in results[0].accuracy.items() for mode in modes]
    table = _table("right answers, and the difference", [f"{t}\n{m}" for t, m in columns])
    for result in results:
        cells = [result.accuracy[task][mode] for task, mode in columns]
        texts = [
            f"{100 * a.score.mean:.1f} %\n"
            f"{100 * a.difference.mean:+.0f} ({100 * a.difference.low:+.0f} to "
            f"{100 * a.difference.high:+.0f})"
            for a in cells
        ]
        size = next(iter(result.state_bytes.values()), 0)
        table.add_row(result.label, _bytes(size), *texts)
    return table


def _table(title: str, headings: Any) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("variant", overflow="fold")
    for heading in ("state", *headings):
        table.add_column(heading, justify="right")
    return table


def _bytes(size: int) -> str:
    return f"{size / 1024:.0f} KiB" if size else ""
