"""`rewriter kernels`: the GPU kernels a model wants, as source and machine code in a directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewriter.errors import ConfigError
from rewriter.export.directory import check_target, replaced, write_json, write_manifest
from rewriter.program import Program

__all__ = ["SUMMARY", "kernels_of", "shown"]

SUMMARY = "kernels.json"


def kernels_of(
    model: Any,
    directory: Path,
    *,
    target: str,
    passes: Any = "default",
    example_inputs: Any = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Optimise a model, compile what its graph wants, and put it all into a directory, or nothing.

    For each kernel there are `NAME.py` (the text), `NAME.cubin` and `NAME.ptx` (or `.hsaco` and
    `.amdgcn`) and `NAME.json`: entry, arguments in order, grid rule, threads, shared memory, registers,
    spilled bytes, and the nodes that want it. `kernels.json` sums up.

    Returns:
        what `kernels.json` holds.

    Raises:
        ConfigError: an unknown target, or no Triton. ArtifactError: a directory that holds other files.
        KernelCompileError: a text did not compile.
    """
    from codegen.compile import Target, compile_texts
    from rewriter.api import optimize

    kind = Target.parse(target)
    check_target(directory)
    optimized = optimize(model, example_inputs, passes=passes, backend="eager", on_stage=on_stage)
    on_stage("describe")
    texts, entries, missing = _sources(optimized.program)
    on_stage("compile")
    compiled = compile_texts(texts, target) if texts else {}
    summary = {"target": target, "kernels": [], "without_kernel": missing}
    with replaced(directory) as place:
        for name, result in compiled.items():
            facts = {"name": name, **entries[name], **result.facts}
            (place / f"{name}.py").write_text(texts[name], encoding="utf-8")
            (place / f"{name}.{kind.binary}").write_bytes(result.binary)
            (place / f"{name}.{kind.assembly}").write_text(result.assembly, encoding="utf-8")
            write_json(place / f"{name}.json", facts)
            summary["kernels"].append(facts)
        write_json(place / SUMMARY, summary)
        write_manifest(place)
    return summary


def _sources(
    program: Program,
) -> tuple[dict[str, str], dict[str, dict[str, Any]], list[dict[str, str]]]:
    """Texts by name, what they are for by name, and nodes that have no kernel."""
    from codegen.cache import content_hash
    from codegen.kernel import select
    from codegen.triton_kernels.generate import unaligned
    from codegen.triton_kernels.table import KERNELS
    from codegen.wanted_kernels import wanted_kernels

    texts, entries = {}, {}
    wanted, unmet = wanted_kernels(program)
    missing = [{"node": each.node, "reason": each.reason} for each in unmet]
    for each in wanted:
        try:
            kernel = select(each.description, KERNELS, "triton").kernel
        except ConfigError as error:
            missing += [{"node": node, "reason": error.allowed} for node in each.nodes]
            continue
        text = kernel.source(each.description)
        text = text if each.aligned else unaligned(text)
        name = f"{each.description.operator}_{content_hash(text)[:12]}"
        texts[name] = text
        entries[name] = {"description": str(each.description), "nodes": list(each.nodes)}
    return texts, entries, missing


def shown(summary: dict[str, Any], directory: Path) -> str:
    """The summary for people."""
    kernels = summary["kernels"]
    width = max((len(kernel["name"]) for kernel in kernels), default=0)
    lines = [
        f"{kernel['name']:{width}}  {kernel['registers']:3} registers"
        f"  {kernel['shared_bytes']:6} B shared  {kernel['spilled_bytes']} B spilled"
        f"  {len(kernel['nodes'])} sites  {kernel['description']}"
        for kernel in kernels
    ]
    reasons = Counter(each["reason"] for each in summary["without_kernel"])
    lines += [f"without a kernel: {count} sites, {reason}" for reason, count in reasons.items()]
    return "\n".join([*lines, f"{len(kernels)} kernels for {summary['target']} in {directory}"])
