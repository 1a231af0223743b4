"""`rewriter ir`: collect LLVM IR into a dataset, look at it, and train cost models on it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ir_dataset.cost_models.cli import app as cost
from rewriter.cli.console import err, guarded, out, write_json
from rewriter.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(
    name="ir",
    no_args_is_help=True,
    help="Collect LLVM IR from real builds into a dataset, and train cost models on it.\n\n"
    "CONFIG is a corpus file, or the name of one that ships: small, small-pip, medium, large.",
)

app.add_typer(cost)

ConfigFile = Annotated[
    str, typer.Option("--config", "-c", help="corpus.toml, or small, small-pip, medium, large")
]
StorePath = Annotated[
    Path, typer.Option("--store", help="where objects and task states are kept between runs")
]
Output = Annotated[Path, typer.Option("-o", "--output", help="directory of the dataset")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", help="tasks beside each other; 0: one a core")]
ExecutorName = Annotated[str, typer.Option("--executor", help="local or ray")]
RayAddress = Annotated[str | None, typer.Option(help="of a running Ray cluster")]
RetryFailed = Annotated[bool, typer.Option(help="run failed tasks again")]
Budget = Annotated[
    float | None,
    typer.Option("--budget-s", help="start no fetch or build after this many seconds"),
]
Limit = Annotated[int | None, typer.Option(help="at most this many packages of each source")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
Debug = Annotated[bool, typer.Option("--debug", hidden=True)]

DEFAULT_STORE = Path("~/.cache/rewriter/ir")


def _run(until: str, **options: Any) -> dict[str, Any]:
    """Run the pipeline up to a stage, showing progress on stderr."""
    from ir_dataset.config import load_config, shipped
    from ir_dataset.executor import make_executor
    from ir_dataset.pipeline import Pipeline
    from ir_dataset.progress import shown
    from ir_dataset.runner import Runner
    from ir_dataset.store import Store

    config, sources = load_config(shipped(options["config"]))
    store = Store(options["store"].expanduser())
    deadline = _deadline(options["budget_s"])
    executor = make_executor(options["executor"], _jobs(options["jobs"]), options["ray_address"])
    try:
        with shown(err) as progress:
            runner = Runner(
                store,
                executor,
                progress,
                retry_failed=options["retry_failed"],
                stop=lambda: time.monotonic() > deadline,
            )
            pipeline = Pipeline(config, sources, runner, limit=options["limit"])
            return pipeline.run(until, options.get("output"))
    finally:
        executor.close()
        store.close()


def _deadline(budget_s: float | None) -> float:
    if budget_s is not None and budget_s < 0:
        raise ConfigError("budget-s", budget_s, "0 or more seconds")
    return float("inf") if budget_s is None else time.monotonic() + budget_s


def _jobs(jobs: int) -> int:
    import os

    if jobs < 0:
        raise ConfigError("jobs", jobs, "0 (one a core) or more")
    return jobs or len(os.sched_getaffinity(0))


def _check_installed() -> None:
    import importlib.util

    needed = (
        "msgspec",
        "pebble",
        "pyarrow",
        "llvmlite",
        "lightgbm",
        "debian",
        "license_expression",
    )
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError("ir", ", ".join(absent), "installed: pip install 'rewriter[ir]'")


@app.command()
def run(
    config: ConfigFile = "small",
    output: Output = Path("ir-dataset"),
    store: StorePath = DEFAULT_STORE,
    until: Annotated[
        str, typer.Option(help="last stage to run, e.g. fetch, build, dedup")
    ] = "train",
    jobs: Jobs = 0,
    executor: ExecutorName = "local",
    ray_address: RayAddress = None,
    retry_failed: RetryFailed = False,
    budget_s: Budget = None,
    limit: Limit = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run all stages: from sources to Parquet, a card and models. Run it again to go on after a stop."""
    with guarded(debug):
        _check_installed()
        from ir_dataset.pipeline import ORDER

        if until not in ORDER:
            raise ConfigError("until", until, f"one of {', '.join(ORDER)}")
        done = _run(
            until,
            config=config,
            output=output,
            store=store,
            jobs=jobs,
            executor=executor,
            ray_address=ray_address,
            retry_failed=retry_failed,
            budget_s=budget_s,
            limit=limit,
        )
        if as_json:
            write_json(done)
        else:
            _show(done, output if ORDER.index(until) >= ORDER.index("pack") else None)


def _show(done: dict[str, Any], output: Path | None) -> None:
    table = Table(title="stages")
    for column in ("stage", "tasks", "from before", "failed", "wall s", "task s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for one in done["stages"]:
        counts = (one["total"], one["reused"], one["failed"])
        times = (f"{one['wall_s']:.0f}", f"{one['task_s']:.0f}")
        table.add_row(one["stage"], *map(str, counts), *times)
    out.print(table)
    for name, why in done["skipped"].items():
        out.print(f"skipped {name}: {why}", markup=False)
    if any(one["failed"] for one in done["stages"]):
        out.print("why tasks failed: rewriter ir failures; again: --retry-failed", markup=False)
    if output is not None:
        out.print(f"dataset: {output}", markup=False)


@app.command()
def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Which compilers and readers are here, and of which LLVM; exit code 1 where versions mix."""
    with guarded(debug):
        import msgspec

        from ir_dataset.toolchain import Toolchain

        found = Toolchain.find()
        rows, mixed = found.matrix(), found.mixed()
        if as_json:
            write_json({"tools": msgspec.to_builtins(rows), "mixed": list(mixed)})
        else:
            _show_tools(rows, mixed)
        if mixed:
            raise typer.Exit(1)


def _show_tools(rows: Any, mixed: Any) -> None:
    table = Table()
    for name in ("tool", "role", "LLVM", "status", "where, or how to get it"):
        table.add_column(name, overflow="fold")
    for row in rows:
        place = row.path or row.install
        table.add_row(row.name, row.role, row.llvm_version, row.status, place)
    out.print(table)
    for line in mixed:
        out.print(f"mixed: {line}", style="red", markup=False)


@app.command()
def failures(
    store: StorePath = DEFAULT_STORE,
    stage: Annotated[str | None, typer.Option(help="of this stage alone")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """What failed, and why."""
    with guarded(debug):
        _check_installed()
        from ir_dataset.store import Store

        rows = Store(store.expanduser()).failures(stage)
        if as_json:
            write_json([vars(row) for row in rows])
            return
        for row in rows:
            first = (row.error.splitlines() or [""])[0]
            out.print(f"{row.stage} {row.label}: {row.error_kind}: {first}", markup=False)


Dataset = Annotated[Path, typer.Argument(help="directory that `run` wrote")]


@app.command()
def stats(dataset: Dataset, debug: Debug = False) -> None:
    """Draw a dataset's card: tokens, instructions, sizes, duplicates and licences by language."""
    with guarded(debug):
        _check_installed()
        from ir_dataset.card import write_card

        write_card(dataset)
        out.print(str(dataset / "card.html"), markup=False)


@app.command("export-compile")
def export_compile(
    dataset: Dataset,
    output: Annotated[Path, typer.Option("-o", "--output", help="directory to write")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the modules with ComPile's six columns alone, one Parquet file a language."""
    with guarded(debug):
        _check_installed()
        from ir_dataset.export_compile import export_compile as export

        counts = export(dataset, output)
        if as_json:
            write_json(counts)
            return
        for language, count in counts.items():
            out.print(f"{language}: {count:,} modules", markup=False)
