"""`rewriter`: the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ir_dataset.cli import app as ir
from rewriter.cli.arguments import check_file, costed, examples, parse_ids
from rewriter.cli.console import guarded, out, stages, write_json
from rewriter.errors import ConfigError
from rewriter.export.formats import artifact_kind

__all__ = ["app", "main"]

app = typer.Typer(
    name="rewriter",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Optimise PyTorch models by rewriting their graphs, and check every rewrite.\n\n"
    "MODEL is a Hugging Face directory, a .pt2 of torch.export, or package.module:factory.\n\n"
    "Exit codes: 0 done, 1 verification failed, 2 bad usage or input, 3 a defect of ours, "
    "130 interrupted.",
)

app.add_typer(ir)

Model = Annotated[
    str, typer.Argument(help="Hugging Face directory, .pt2, or package.module:factory")
]
Passes = Annotated[
    list[str] | None,
    typer.Option(
        "--passes", "-p", help="pass spec, e.g. 'streaming-llm{recent_window=252}'; repeat"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
Debug = Annotated[bool, typer.Option("--debug", hidden=True)]
Shape = Annotated[
    list[str] | None,
    typer.Option("--input-shape", help="of a plain module's fp32 input, e.g. 1x3x224x224; repeat"),
]


@app.command()
def passes(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the passes, what they promise, and their knobs."""
    with guarded(debug):
        from rewriter.api import list_passes

        found = list_passes()
        if as_json:
            write_json([vars(info) for info in found])
            return
        for info in found:
            out.print(f"[bold]{info.name}[/bold]  [dim]{info.fidelity}, {info.source}[/dim]")
            out.print(f"  {info.summary}", markup=False)
            for name, value in info.knobs.items():
                out.print(f"  {name}={value}", style="dim", markup=False)


@app.command()
def optimize(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="directory to save to")
    ] = None,
    passes: Passes = None,
    backend: Annotated[str, typer.Option(help="auto, eager, inductor, cpu or triton")] = "auto",
    verify: Annotated[bool, typer.Option(help="check every rewrite")] = True,
    strict: Annotated[bool, typer.Option(help="a pass that matches nothing is an error")] = False,
    cost: Annotated[
        str,
        typer.Option(
            help="predict times by this model and leave out what surely loses: roofline, learned"
        ),
    ] = "none",
    html: Annotated[Path | None, typer.Option(help="write the report to this file")] = None,
    input_shape: Shape = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Optimise a model, check it, report, and save it."""
    with guarded(debug):
        from rewriter.api import optimize as run
        from rewriter.api import resolve_passes
        from rewriter.export.artifact import check_target
        from rewriter.lowering import choose_backend

        resolve_passes(passes or "default")
        choose_backend(backend)
        if output is not None:
            check_target(output)
        if html is not None:
            check_file(html)
        with costed(cost), stages() as on_stage:
            optimized = run(
                model,
                examples(input_shape),
                passes=passes or "default",
                backend=backend,
                verify=verify,
                strict=strict,
                on_stage=on_stage,
            )
            if output is not None:
                on_stage("save")
                optimized.save(output)
        _show_report(optimized.report, html, as_json)
        if output is not None and not as_json:
            out.print(f"\nsaved to {output}", markup=False)


@app.command()
def explain(
    model: Model,
    passes: Passes = None,
    html: Annotated[Path | None, typer.Option(help="write the report to this file")] = None,
    input_shape: Shape = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what matches and what does not, and why, without running the model."""
    with guarded(debug):
        from rewriter.api import explain as run

        if html is not None:
            check_file(html)
        with stages() as on_stage:
            report = run(
                model, examples(input_shape), passes=passes or "default", on_stage=on_stage
            )
        _show_report(report, html, as_json)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="a model, or what `optimize -o` or `export` wrote")],
    prompt: Annotated[str | None, typer.Option(help="text to continue")] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(help="token ids to continue, e.g. '1 2 3'")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    passes: Passes = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Generate text with a saved program, or with a model optimised on the spot."""
    with guarded(debug):
        if (prompt is None) == (prompt_ids is None):
            raise ConfigError("prompt", prompt, "exactly one of --prompt and --prompt-ids")
        ids = parse_ids(prompt_ids)
        chosen = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        if artifact_kind(Path(model)) == "onnx":
            from rewriter.cli.onnx_generation import generate_with_onnx

            _refuse_passes(passes)
            generate_with_onnx(Path(model), prompt, ids, max_new_tokens, as_json, **chosen)
            return
        from rewriter.cli.generation import Sampling, generate_text

        sampling = Sampling(**chosen)
        with stages() as on_stage:
            optimized = _optimized_or_saved(model, passes, on_stage)
        generate_text(optimized, prompt, ids, max_new_tokens, sampling, as_json)


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="what `optimize -o` or `export` wrote")],
    model: Annotated[
        str | None, typer.Argument(help="the model it came from, to compare with")
    ] = None,
    input_shape: Shape = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check an artifact on this machine: its files, and its outputs against the model's.

    Without MODEL it is compared with itself, fed in one call and token by token.
    """
    with guarded(debug):
        from rewriter.cli.artifacts import verify_artifact

        with stages() as on_stage:
            metrics, report = verify_artifact(artifact, model, examples(input_shape), on_stage)
        if as_json:
            statuses = [c.status for c in report.certificates]
            found = {"artifact": str(artifact), "model": model, "metrics": metrics}
            write_json(found | {"unverified": statuses.count("unverified")})
            return
        out.print(str(report), markup=False)
        against = model or "itself, fed token by token"
        out.print(f"\n{artifact}: files are intact; compared with {against}", markup=False)
        for name, value in metrics.items():
            out.print(f"  {name}  {value:.3g}", markup=False)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="a model, or a directory that `optimize -o` saved")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="FILE.onnx, FILE.pt2, or a directory for ONNX")
    ],
    passes: Passes = None,
    ep: Annotated[
        str, typer.Option(help="ONNX: portable, or operators of ONNX Runtime's cpu or cuda")
    ] = "portable",
    target: Annotated[str, typer.Option(help=".pt2: cpu or cuda:sm_90 and the like")] = "cpu",
    portable: Annotated[
        bool, typer.Option(help=".pt2: AOTInductor's code alone, no C++ decode steps")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="tokens of the longest sequence")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help=".pt2: rows of a batch")] = None,
    logits: Annotated[str, typer.Option(help="ONNX: of the last token, or all")] = "last",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: as it was saved")
    ] = None,
    input_shape: Shape = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Optimise a model and write it for ONNX Runtime or AOTInductor, checked beside the program."""
    with guarded(debug):
        from rewriter.cli.export import export_model, show_export

        options = {"ep": ep, "target": target, "portable": portable, "logits": logits}
        options |= {"max_length": max_length, "batch": batch}
        with stages() as on_stage:
            summary = export_model(
                model, output, passes, dtype, options, examples(input_shape), on_stage
            )
        write_json(summary) if as_json else show_export(summary)


@app.command()
def inspect(
    artifact: Annotated[Path, typer.Argument(help="what `optimize -o` or `export` wrote")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the passes, state, operators and versions of an artifact, once its hashes were checked."""
    with guarded(debug):
        from rewriter.cli.artifacts import inspect_artifact, show_artifact

        facts = inspect_artifact(artifact)
        write_json(facts) if as_json else show_artifact(facts)


@app.command()
def quality(
    model: Annotated[str, typer.Argument(help="Hugging Face directory with a tokenizer")],
    passes: Passes = None,
    densities: Annotated[
        str | None, typer.Option(help="percentages kept, e.g. 12.5,25,50,100")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="pass spec to compare with instead of the model; repeat"),
    ] = None,
    controls: Annotated[bool, typer.Option(help="also random and recent-only, equal bytes")] = True,
    tasks: Annotated[str, typer.Option(help="names, joined by commas")] = "retrieval,arithmetic",
    text: Annotated[
        list[str] | None, typer.Option(help='a text file, FILE.jsonl:FIELD, or "sentences"; repeat')
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="tokens of a row or context; default: 1024, or all positions"),
    ] = None,
    rows: Annotated[int, typer.Option(help="rows of a text, for each seed")] = 2,
    samples: Annotated[int, typer.Option(help="contexts of a task, for each seed")] = 8,
    questions: Annotated[int, typer.Option(help="questions about each context")] = 4,
    modes: Annotated[str, typer.Option(help="joined by commas")] = "multi-request,multi-turn",
    seeds: Annotated[int, typer.Option(min=1, help="how many")] = 3,
    written: Annotated[int, typer.Option(help="tokens of free-running text")] = 64,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: as it was saved")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="write a PNG picture to this file")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="write the JSON to this file too")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure what rewrites cost in quality, on tasks and texts, beside controls at equal bytes."""
    with guarded(debug):
        from rewriter.cli import quality as command
        from rewriter.quality.measure import measure_quality
        from rewriter.quality.suite import Settings

        wanted = command.parse_densities(densities)
        settings = Settings(
            tasks=command.parse_names(tasks),
            texts=tuple(text or ()),
            length=length,
            rows=rows,
            samples=samples,
            questions=questions,
            modes=command.parse_names(modes),
            seeds=tuple(range(seeds)),
            written=written,
        )
        for field, path in (("plot", plot), ("output", output)):
            if path is not None:
                check_file(path, field)
        if plot is not None:
            command.check_plotting()
        with stages() as on_stage:
            on_stage("load")
            loaded, tokenizer = command.load_with_tokenizer(model, dtype)
            report = measure_quality(
                loaded,
                tokenizer,
                passes=passes or "default",
                densities=wanted,
                against=against,
                controls=controls,
                settings=settings,
                name=model,
                on_stage=on_stage,
            )
        command.write(report, output, plot)
        write_json(report.to_json()) if as_json else command.show(report)


@app.command()
def kernels(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="directory to write to")],
    target: Annotated[
        str, typer.Option(help="cuda:sm_80, sm_86, sm_89 or sm_90, or hip:gfx942")
    ] = "cuda:sm_90",
    passes: Passes = None,
    input_shape: Shape = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compile the GPU kernels that a model wants, without a GPU: source, machine code, launch data."""
    with guarded(debug):
        from rewriter.cli.kernels import kernels_of, shown

        with stages() as on_stage:
            summary = kernels_of(
                model,
                output,
                target=target,
                passes=passes or "default",
                example_inputs=examples(input_shape),
                on_stage=on_stage,
            )
        write_json(summary) if as_json else out.print(shown(summary, output), markup=False)


def _optimized_or_saved(model: str, passes: list[str] | None, on_stage: Any) -> Any:
    from rewriter.api import load
    from rewriter.api import optimize as run

    if artifact_kind(Path(model)) is not None:
        _refuse_passes(passes)
        on_stage("load")
        return load(model)
    return run(model, passes=passes or "default", on_stage=on_stage)


def _refuse_passes(passes: list[str] | None) -> None:
    if passes:
        raise ConfigError("passes", passes, "none: an artifact has its passes already")


def _show_report(report: Any, html: Path | None, as_json: bool) -> None:
    if html is not None:
        report.to_html(html)
    if as_json:
        write_json(report.to_json())
    else:
        out.print(str(report), markup=False)


def main() -> None:
    """The `rewriter` command."""
    app()
