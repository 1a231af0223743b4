"""`rewriter inspect` and `verify`: what an artifact says of itself, and whether it still holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rewriter.cli.console import OnStage, out
from rewriter.errors import ArtifactError, VerificationError
from rewriter.export.formats import artifact_kind
from rewriter.report.json import report_from_json
from rewriter.report.report import Report

__all__ = ["inspect_artifact", "show_artifact", "verify_artifact"]

STEPS = 16
"""Tokens that an ONNX file is compared with itself on."""
AGREES = 2e-2
"""Relative error allowed then: rounding in half precision stays below, wrong state does not."""


def inspect_artifact(path: Path) -> dict[str, Any]:
    """What an artifact says of itself, once its hashes were checked. Raises ArtifactError."""
    kind = artifact_kind(path)
    if kind == "onnx":
        from rewriter.export.onnx_file import open_onnx

        return {"format": "onnx", **_facts(open_onnx(path).metadata)}
    if kind == "pt2":
        from rewriter.export.pt2_archive import open_pt2

        return {"format": "pt2", **_facts(open_pt2(path).metadata)}
    if kind == "program":
        from rewriter.api import load

        return {"format": "program", **_program_facts(load(path))}
    raise ArtifactError(f"{path} is no artifact: allowed are a saved program, .onnx or .pt2")


def _facts(metadata: dict[str, Any]) -> dict[str, Any]:
    """What people ask for, the report's certificates counted."""
    left_out = {"report", "sha256", "data", "members", "config", "generation_config", "format"}
    facts = {name: value for name, value in metadata.items() if name not in left_out}
    certificates = metadata["report"]["certificates"]
    return facts | {"certificates": dict(Counter(c["status"] for c in certificates))}


def _program_facts(optimized: Any) -> dict[str, Any]:
    program, report = optimized.program, optimized.report
    calls = Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")
    states = () if program.decoding is None else program.decoding.states
    return {
        "name": program.name,
        "passes": list(report.passes),
        "states": [{"name": s.name, "dims": list(s.dims), "role": s.role} for s in states],
        "operators": dict(calls.most_common()),
        "versions": report.versions,
        "certificates": dict(Counter(c.status for c in report.certificates)),
    }


def show_artifact(facts: dict[str, Any]) -> None:
    """For people: single values in a line each, tables below their names."""
    for name, value in facts.items():
        lines = _lines(value)
        if lines is None:
            out.print(f"{name}: {'-' if value in (None, [], {}) else value}", markup=False)
            continue
        out.print(name, style="bold", markup=False)
        for line in lines:
            out.print(f"  {line}", markup=False)


def _lines(value: Any) -> list[str] | None:
    """Of a table or a list; None for anything that is one value."""
    if not value or not isinstance(value, dict | list):
        return None
    if isinstance(value, list):
        return [_port(item) if isinstance(item, dict) else str(item) for item in value]
    if all(isinstance(item, int) for item in value.values()):
        return [f"{count:4}  {key}" for key, count in sorted(value.items(), key=lambda i: -i[1])]
    return [f"{key}: {item}" for key, item in value.items()]


def _port(item: dict[str, Any]) -> str:
    """An input, an output or a state: names, dtype and dimensions."""
    names = [item[key] for key in ("name", "input", "output") if key in item]
    dims = ", ".join(map(str, item["dims"]))
    return (
        f"{' -> '.join(names)}  {item.get('dtype', '')} [{dims}]  {item.get('role', '')}".rstrip()
    )


def verify_artifact(
    path: Path, model: str | None, example_inputs: Any, on_stage: OnStage
) -> tuple[dict[str, float], Report]:
    """Metrics of an artifact beside the model, or beside itself, and the report that came with it.

    Raises:
        ArtifactError: it is damaged. VerificationError: it computes something else.
    """
    if artifact_kind(path) == "onnx":
        return _verify_onnx(path, model, example_inputs, on_stage)
    from rewriter.api import load, verify_against

    on_stage("load")
    optimized = load(path)
    on_stage("compare")
    return verify_against(optimized, model, example_inputs), optimized.report


def _verify_onnx(
    path: Path, model: str | None, example_inputs: Any, on_stage: OnStage
) -> tuple[dict[str, float], Report]:
    """Beside the model with the artifact's passes applied, which is itself verified on the way."""
    from rewriter.api import optimize
    from rewriter.capture.sources import load_model
    from rewriter.export.onnx_check import check_file
    from rewriter.export.onnx_export import PROVIDERS
    from rewriter.export.onnx_file import open_onnx

    on_stage("check hashes")
    file = open_onnx(path)
    report = report_from_json(file.metadata["report"])
    if model is None:
        on_stage("compare")
        return _with_itself(path), report
    given, specs = load_model(model).to(_dtype(file.metadata)), file.metadata["passes"]
    optimized = optimize(given, example_inputs, passes=specs, backend="eager", on_stage=on_stage)
    on_stage("compare")
    provider = PROVIDERS[file.metadata["ep"]]
    found = check_file(file.model_path, file.metadata, optimized.program, provider)
    return found | optimized.report.end_to_end, report


def _dtype(metadata: dict[str, Any]) -> torch.dtype:
    """That the file was exported in: of its keys and values, or of a module's outputs."""
    cached = [s["dtype"] for s in metadata["states"] if s["role"] in ("keys", "values")]
    return getattr(torch, (cached or [metadata["outputs"][0]["dtype"]])[0])


def _with_itself(path: Path) -> dict[str, float]:
    """A decoder fed in one call and token by token."""
    from rewriter.deploy import OnnxDecoder

    decoder = OnnxDecoder(path)
    ids = np.arange(STEPS, dtype=np.int64)[None] % decoder.metadata["vocab_size"]
    whole = decoder.run(ids)[0, -1]
    session = decoder.session(1, capacity=STEPS)
    steps = [session.run(ids[:, column : column + 1])[0, -1] for column in range(STEPS)]
    error = float(np.linalg.norm(steps[-1] - whole) / np.linalg.norm(whole))
    if not error <= AGREES:
        raise VerificationError(
            f"{path} fed token by token differs from one call by {error:.2g}, allowed {AGREES}"
        )
    return {"error": error}
