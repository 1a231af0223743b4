"""`rewriter ir cost`: what the size models say of a module, and how far they can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from rewriter.cli.console import guarded, out, write_json
from rewriter.errors import ArtifactError

if TYPE_CHECKING:
    from ir_dataset.cost_models.predict import ModuleSizes

__all__ = ["app"]

app = typer.Typer(
    name="cost",
    no_args_is_help=True,
    help="Sizes of machine code, told from unoptimised IR by the models of a dataset.",
)

Models = Annotated[
    Path | None,
    typer.Option("--models", help="directory with size_*.json.gz; those that ship unless given"),
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
Debug = Annotated[bool, typer.Option("--debug", hidden=True)]


@app.command()
def predict(
    module: Annotated[Path, typer.Argument(help="unoptimised IR (.ll, .bc), or C or C++")],
    models: Models = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Bytes of each function at -Oz and -O2, with the interval that holds 80 % of such answers.

    `?` marks functions unlike those the model learned from, whose answer may be far off.
    """
    with guarded(debug):
        from ir_dataset.cost_models.predict import load_size_models, predict_sizes

        found = predict_sizes(module, load_size_models(models))
        if as_json:
            write_json({"module": str(module), "functions": _as_rows(found)})
        else:
            _show(found)


def _as_rows(found: ModuleSizes) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            **{
                kind: {
                    "bytes": round(float(answer.size[at]), 1),
                    "low": round(float(answer.low[at]), 1),
                    "high": round(float(answer.high[at]), 1),
                    "unsure": bool(answer.unsure[at]),
                }
                for kind, answer in found.answers.items()
            },
        }
        for at, name in enumerate(found.names)
    ]


def _show(found: ModuleSizes) -> None:
    table = Table()
    table.add_column("function", overflow="fold")
    for kind in found.answers:
        for name in (f"{kind} bytes", "80 %", ""):
            table.add_column(name, justify="right")
    for row in _as_rows(found):
        cells = [
            text
            for kind in found.answers
            for text in (
                f"{row[kind]['bytes']:.0f}",
                f"{row[kind]['low']:.0f} to {row[kind]['high']:.0f}",
                "?" if row[kind]["unsure"] else "",
            )
        ]
        table.add_row(row["name"], *cells)
    out.print(table)


@app.command("eval")
def evaluate(
    dataset: Annotated[Path, typer.Argument(help="directory that `run` wrote")],
    models: Models = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Judge size models on the projects and the language that a dataset holds out."""
    with guarded(debug):
        from ir_dataset.cost_models.fit_dataset import judge
        from ir_dataset.cost_models.predict import load_size_models
        from ir_dataset.cost_models.size_data import read

        data = read(dataset)
        told = {
            kind: {
                "learned_from_this_dataset": model.training_data == data.digest,
                **judge(model, data),
            }
            for kind, model in load_size_models(models).items()
            if kind in data.sizes
        }
        if not any(isinstance(of, dict) for sets in told.values() for of in sets.values()):
            raise ArtifactError(f"{dataset}: no held-out function has a size to judge by")
        if as_json:
            write_json(told)
        else:
            _show_metrics(told)


_METRICS = {
    "mape": "MAPE",
    "median_ape": "median",
    "tau": "Kendall τ",
    "inside_interval": "in interval",
    "unsure_share": "unsure",
}


def _show_metrics(told: dict[str, dict[str, Any]]) -> None:
    table = Table()
    for name in ("level", "set", "functions", *_METRICS.values()):
        table.add_column(name, justify="left" if name in ("level", "set") else "right")
    for kind, sets in told.items():
        for split, of in sets.items():
            if isinstance(of, dict):
                figures = [f"{of[name]:.3f}" for name in _METRICS]
                table.add_row(kind, split, f"{of['rows']:.0f}", *figures)
    out.print(table)
    strange = [kind for kind, sets in told.items() if not sets["learned_from_this_dataset"]]
    if strange:
        out.print(
            f"{', '.join(strange)}: learned from another dataset, which may share functions with this one",
            markup=False,
        )
