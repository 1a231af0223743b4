"""`rewriter export`: what was written, and what of the rewrites went into it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rewriter.cli.arguments import parse_dtype
from rewriter.cli.console import OnStage, out
from rewriter.errors import ConfigError
from rewriter.export.formats import artifact_kind, check_export, export_optimized

__all__ = ["export_model", "show_export"]


def export_model(
    model: str,
    output: Path,
    passes: list[str] | None,
    dtype: str | None,
    options: dict[str, Any],
    example_inputs: Any,
    on_stage: OnStage,
) -> dict[str, Any]:
    """Optimise, or load what was optimised, and export. Returns the summary as plain types.

    Raises:
        ConfigError: options, before the long work starts; others as of `optimize` and `export`.
    """
    from rewriter.api import load, optimize, resolve_passes
    from rewriter.capture.sources import load_model

    wanted = parse_dtype(dtype)
    check_export(output, options)
    if artifact_kind(Path(model)) == "program":
        if passes:
            raise ConfigError("passes", passes, "none: a saved program has its passes already")
        on_stage("load")
        optimized = load(model)
        if wanted is not None:
            optimized = optimized.to(wanted)
    else:
        resolve_passes(passes or "default")
        given = model if wanted is None else load_model(model).to(wanted)
        optimized = optimize(
            given, example_inputs, passes=passes or "default", backend="eager", on_stage=on_stage
        )
        if wanted is not None and Path(model).is_dir():
            optimized.source_directory = Path(model)
    summary = export_optimized(optimized, output, on_stage=on_stage, **options)
    return _summary(optimized, summary)


def _summary(optimized: Any, summary: Any) -> dict[str, Any]:
    """Of an export: what was written, and of the rewrites: kept, undone, missed."""
    report = optimized.report
    kept = [c for c in report.certificates if c.status != "rolled_back"]
    undone = [c for c in report.certificates if c.status == "rolled_back"]
    facts = {name: value for name, value in vars(summary).items() if name != "path"}
    return {
        "path": str(summary.path),
        **facts,
        "rewrites": dict(Counter(c.spec for c in kept)),
        "undone": [f"{c.spec} at {c.site}: {c.reason}" for c in undone],
        "missed": dict(Counter(f"{m.subject}: {m.reason}" for m in report.misses)),
    }


def show_export(summary: dict[str, Any]) -> None:
    """For people."""
    size = summary.get("bytes", summary.get("file_bytes", 0))
    seconds = summary["seconds"]
    out.print(f"{summary['path']}  {_size(size)}, {sum(seconds.values()):.1f} s", markup=False)
    for title, found in (
        ("rewrites", summary["rewrites"]),
        ("operators", summary.get("operators", {})),
    ):
        for name, count in sorted(found.items(), key=lambda item: -item[1]):
            out.print(f"  {title}  {count:4} {name}", markup=False)
    for name, reason in summary.get("decomposed", {}).items():
        out.print(f"  decomposed  {name}: {reason}", markup=False)
    for line in summary["undone"]:
        out.print(f"  undone  {line}", markup=False)
    for line, count in summary["missed"].items():
        out.print(f"  missed  {count:4} {line}", markup=False)
    for line in summary.get("notes", ()):
        out.print(f"  note  {line}", markup=False)
    if "agreement" in summary:
        found = summary["agreement"]
        told = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
        out.print(f"  checked beside the program: {told}", markup=False)
    elif "checked" in summary:
        out.print(f"  checked in a new process: {', '.join(summary['checked'])}", markup=False)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
