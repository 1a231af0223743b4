"""`rewriter quality`: options in, a table, JSON or a picture out."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rewriter.cli.arguments import parse_dtype
from rewriter.cli.console import out
from rewriter.errors import ConfigError, ModelError
from rewriter.quality.bootstrap import Interval
from rewriter.quality.report import Accuracy, QualityReport, Result
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


def load_with_tokenizer(directory: str, dtype: str | None) -> tuple[Any, Any]:
    """Model, in `dtype` or as it was saved, and tokenizer of a Hugging Face directory.

    Raises:
        ModelError: something is missing or damaged. ConfigError: an unknown dtype.
    """
    from transformers import AutoTokenizer

    from rewriter.capture.sources import load_model

    wanted = parse_dtype(dtype)
    model = load_model(directory).to(wanted)
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
    """One table for each source, one for the tasks, and the passes in full."""
    first = report.results[0]
    for source in first.fidelity:
        out.print(_fidelity_table(source, report.results))
    for task in first.accuracy:
        out.print(_accuracy_table(task, report.results))
    for name, result in zip(_names(report.results), report.results, strict=True):
        if " + ".join(result.specs) not in ("", name):
            out.print(f"{name}: {' + '.join(result.specs)}", markup=False)
        for reason in result.undone:
            out.print(f"{name}: undone: {reason}", markup=False)


def _names(results: list[Result]) -> list[str]:
    """Short names of the variants: method or control, and the share that is kept."""
    names = []
    for result in results:
        method = " + ".join(spec.partition("{")[0] for spec in result.specs) or "dense"
        name = f"  {result.control}" if result.control else method
        names.append(name if result.density is None else f"{name} {100 * result.density:g} %")
    repeated = len(set(names)) < len(names)
    return [result.label for result in results] if repeated else names


def _fidelity_table(source: str, results: list[Result]) -> Table:
    headings = ("KL", "KL p99", "agree %", "ppl", "prefix", "mass/best")
    table = _table(f"{source}: distance from the original, token by token", headings)
    for name, result in zip(_names(results), results, strict=True):
        f = result.fidelity[source]
        table.add_row(
            name,
            _kib(result.state_bytes[source]),
            f"{f.kl_mean:.1e}",
            f"{f.kl_p99:.1e}",
            f"{100 * f.agreement:.1f}",
            f"{f.perplexity:.3g}",
            f"{f.common_prefix:.0f}",
            "" if f.mass is None else f"{f.mass.variant:.2f}/{f.mass.oracle:.2f}",
        )
    return table


def _accuracy_table(task: str, results: list[Result]) -> Table:
    modes = results[0].accuracy[task]
    headings = [text for mode in modes for text in (mode.replace("-", "-\n"), "difference")]
    seen = any(a.by_evidence for a in modes.values())
    headings += ["kept", "dropped"] if seen else []
    table = _table(
        f"{task}: right answers in %, and the difference to {results[0].label}", headings
    )
    for name, result in zip(_names(results), results, strict=True):
        found = result.accuracy[task].values()
        cells = [text for a in found for text in (_score(a.score), _difference(a.difference))]
        cells += [_evidence(found, "kept"), _evidence(found, "dropped")] if seen else []
        table.add_row(name, _kib(result.task_bytes[task]), *cells)
    if seen:
        table.caption = "kept, dropped: the cache held all, or not all, of what was asked for"
    return table


def _score(interval: Interval) -> str:
    return f"{100 * interval.mean:.0f}"


def _difference(interval: Interval) -> str:
    mean, low, high = (100 * v for v in (interval.mean, interval.low, interval.high))
    return f"{mean:+.0f} ±{(high - low) / 2:.0f}"


def _evidence(accuracies: Iterable[Accuracy], name: str) -> str:
    """Right answers of all modes where the evidence was kept or dropped."""
    cells = [a.by_evidence[name] for a in accuracies if name in a.by_evidence]
    count = sum(number for _, number in cells)
    return f"{100 * sum(mean * n for mean, n in cells) / count:.0f} %" if count else "-"


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in ("KiB", *headings):
        table.add_column(heading, justify="right")
    return table


def _kib(size: int) -> str:
    return f"{size / 1024:.0f}"
