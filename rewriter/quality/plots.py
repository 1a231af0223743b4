"""Quality against bytes as one picture: what a method keeps, and what its controls keep."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from rewriter.quality.report import QualityReport, Result

__all__ = ["draw"]

COLORS = ("#2f6fb0", "#c0504d", "#7f7f7f", "#4f9d5d", "#8064a2")
WIDTH, HEIGHT = 4.6, 3.6
"""Inches of one panel."""

Panel = tuple[str, str, Callable[[Result], tuple[float, float, float]]]
"""Title, label of the y axis, and value with lower and upper bound."""


def draw(report: QualityReport) -> bytes:
    """A PNG with a panel for each source's KL and each task's accuracy, over the state's bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(report)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax, panel in zip(axes, panels, strict=False):
        _draw_panel(ax, panel, report.results)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(report.model, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _panels(report: QualityReport) -> list[Panel]:
    first, panels = report.results[0], []
    for source in first.fidelity:
        panels.append((source, "KL to the original, nats", _kl_of(source)))
    for task, modes in first.accuracy.items():
        panels += [(f"{task}, {mode}", "right answers, %", _score_of(task, mode)) for mode in modes]
    return panels


def _kl_of(source: str) -> Callable[[Result], tuple[float, float, float]]:
    def value(result: Result) -> tuple[float, float, float]:
        fidelity = result.fidelity[source]
        seeds = fidelity.by_seed.values()
        return fidelity.kl_mean, min(seeds), max(seeds)

    return value


def _score_of(task: str, mode: str) -> Callable[[Result], tuple[float, float, float]]:
    def value(result: Result) -> tuple[float, float, float]:
        score = result.accuracy[task][mode].score
        return 100 * score.mean, 100 * score.low, 100 * score.high

    return value


def _draw_panel(ax: Any, panel: Panel, results: list[Result]) -> None:
    """One line for each method and control; what they are compared with as a dashed line."""
    title, label, value = panel
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("KiB of state for one row", fontsize=8)
    ax.set_ylabel(label, fontsize=8)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    base, *others = results
    ax.axhline(value(base)[0], color="black", linewidth=1, linestyle="--", label=base.label)
    names = dict.fromkeys(_series(result) for result in others)
    for name, color in zip(names, COLORS, strict=False):
        points = [(_kib(r), *value(r)) for r in others if _series(r) == name]
        points.sort()
        x, y, low, high = zip(*points, strict=True)
        ax.plot(x, y, marker="o", markersize=4, linewidth=1.5, color=color, label=name)
        ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _series(result: Result) -> str:
    """The method without its knobs, or the control."""
    return result.control or " + ".join(spec.split("{")[0] for spec in result.specs)


def _kib(result: Result) -> float:
    return max((*result.state_bytes.values(), *result.task_bytes.values())) / 1024
