"""The card of a dataset: what is in it, what was left out and why, as one HTML page and a README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from ir_dataset.card_plots import draw_plots
from rewriter.export.directory import read_json
from rewriter.report.files import write_file

__all__ = ["COMPILE_TOKENS", "write_card"]

COMPILE_TOKENS = 182e9
"""Tokens of ComPile as its paper counts them; what this pipeline would take for as many is told."""

_TEMPLATE = Path(__file__).with_name("card.html")
_README = """\
---
license: other
license_name: per-module
pretty_name: {name}
tags: [llvm-ir, bitcode, compilers]
configs:
{configs}---

# {name}

{modules:,} modules with {functions:,} functions of LLVM IR, taken from {packages} packages before any
optimisation. `content` is bitcode; `license_expression` is of that row. See `card.html` for figures.

```python
import datasets
datasets.load_dataset("parquet", data_files="data/*/train-*.parquet")
```
"""
_CONFIG = """\
- config_name: {language}
  data_files:
{files}"""


def write_card(directory: Path) -> None:
    """Write `card.html`, with its pictures inside, and `README.md` into a dataset's directory.

    Raises:
        ArtifactError: it is no dataset, or one of its files is damaged.
    """
    summary, audit = (read_json(directory / name) for name in ("summary.json", "audit.json"))
    run = read_json(directory / "run.json") if (directory / "run.json").exists() else {"stages": []}
    models_path = directory / "models.json"
    models = read_json(models_path) if models_path.exists() else {}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        summary=summary,
        audit=audit,
        stages=run["stages"],
        models=models,
        plots=draw_plots(directory, summary),
        scale=_scale(summary, run["stages"]),
    )
    write_file(directory / "card.html", page.encode(), "dataset")
    write_file(directory / "README.md", _readme(directory, summary).encode(), "dataset")


def _readme(directory: Path, summary: dict[str, Any]) -> str:
    configs = ""
    for place in sorted((directory / "data").iterdir()):
        splits = sorted({path.name.partition("-")[0] for path in place.iterdir()})
        files = "".join(
            f"  - split: {split}\n    path: data/{place.name}/{split}-*.parquet\n"
            for split in splits
        )
        configs += _CONFIG.format(language=place.name, files=files)
    languages = summary["languages"].values()
    return _README.format(
        name=summary["name"],
        configs=configs,
        packages=summary["packages_built"],
        modules=sum(one.get("kept_modules", 0) for one in languages),
        functions=sum(one.get("kept_functions", 0) for one in languages),
    )


def _scale(summary: dict[str, Any], stages: list[dict[str, Any]]) -> dict[str, float] | None:
    """What as many tokens as ComPile's would take, from this run's own rates; None without tokens."""
    tokens = summary["tokens"]
    core_s = sum(one["task_s"] for one in stages)
    languages = summary["languages"].values()
    chars = sum(one.get("kept_chars", 0) for one in languages)
    if not tokens["tokens"] or not core_s:
        return None
    per_char = tokens["tokens"] / tokens["chars"]
    here = chars * per_char
    return {
        "chars_per_token": 1 / per_char,
        "tokens": here,
        "core_s": core_s,
        "tokens_per_core_s": here / core_s,
        "wanted": COMPILE_TOKENS,
        "core_hours": COMPILE_TOKENS / here * core_s / 3600,
        "bitcode_gb": sum(one.get("kept_bytes", 0) for one in languages)
        / here
        * COMPILE_TOKENS
        / 1e9,
    }
