"""An optimized program as an ONNX file that says what it is, checked beside the program first."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from rewriter.errors import ArtifactError, ConfigError
from rewriter.export.cast import cast, weight_dtype
from rewriter.export.directory import permissions
from rewriter.export.functional import functional
from rewriter.export.onnx_check import check_file
from rewriter.export.onnx_file import FORMAT, KEY, UNSEALED, metadata_text, seal
from rewriter.export.onnx_fusions import fuse_skip_norms, pack_projections
from rewriter.export.onnx_graph import (
    count_operators,
    name_ports,
    store_data,
    store_transposed,
    strip,
)
from rewriter.export.onnx_loops import expand_experts
from rewriter.export.onnx_trace import trace, translate, with_dtypes
from rewriter.export.ports import Functional, Port, StatePorts
from rewriter.optimized import OptimizedModel
from rewriter.report.json import report_to_json
from rewriter.stages import Clock

__all__ = ["PROVIDERS", "OnnxSummary", "export_onnx"]

PROVIDERS = {
    "portable": "CPUExecutionProvider",
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
}
"""Execution providers by `ep`; "portable" has standard operators only and runs on any."""
DTYPES = {
    "portable": (torch.float32, torch.float16, torch.float64),
    "cpu": (torch.float32, torch.float16),
    "cuda": (torch.float16, torch.bfloat16),
}
"""Dtypes of weights that the operators of a provider compute with; ONNX Runtime's CPU has no bfloat16."""
LOGITS = ("last", "all")
EXPERTS_REASON = "no standard operator; a Loop over the experts that were chosen"
PACKAGES = ("rewriter", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class OnnxSummary:
    """What was written.

    Attributes:
        operators: how often each stands in the graph.
        decomposed: dialect operators that have no operator of ONNX, and why.
        agreement: what the check beside the program found: `logits`, `greedy`, `limit`.
        seconds: by stage. notes: what else should be known.
    """

    path: Path
    bytes: int
    operators: dict[str, int]
    decomposed: dict[str, str]
    agreement: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    notes: tuple[str, ...] = ()


def export_onnx(
    optimized: OptimizedModel,
    path: Path,
    *,
    ep: str = "portable",
    logits: str = "last",
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    on_stage: Callable[..., None] | None = None,
) -> OnnxSummary:
    """Write `path` and, for what is large, `path.name + ".data"` beside it; all or nothing.

    Args:
        ep: "portable" = standard operators of opset 23; "cpu" and "cuda" = also those of ONNX Runtime.
        logits: of a language model: of the "last" token of each row, or of "all".
        max_length: positions for which rotary tables are stored; None = all that the model has.
        dtype: of weights and state; None = as they are.
        on_stage: called with the name of each stage as it starts.

    Raises:
        ConfigError: an unknown option. ExportError: a part of the program that ONNX cannot express.
        VerificationError: the file computes something else than the program; nothing is written.
        ArtifactError: the file cannot be written.
    """
    _check_options(ep, logits, max_length)
    program = optimized.program
    dtype = weight_dtype(program) if dtype is None else dtype
    _check_dtype(ep, dtype)
    clock = Clock(on_stage)
    path = Path(path).absolute()
    with clock("trace"):
        converted = cast(program, dtype)
        form = functional(converted, ep=ep, logits=logits, max_length=max_length)
        exported = trace(form.module, form.inputs, form.examples)
    with clock("translate"):
        model = translate(exported, form.inputs, form.outputs)
        if expand_experts(model):
            form.decomposed["moe"] = EXPERTS_REASON
        name_ports(model, form.inputs, form.outputs)
        store_transposed(model)
        if ep != "portable":
            pack_projections(model)
            fuse_skip_norms(model)
        strip(model)
        form.outputs = with_dtypes(form.outputs, model)
    del exported
    metadata = _metadata(optimized, form, model, ep, logits)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
            written = Path(temporary) / path.name
            with clock("write"):
                _write(model, metadata, written)
            with clock("check"):
                agreement = check_file(written, metadata, converted, PROVIDERS[ep])
            _put_in_place(written, path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error
    size = sum(p.stat().st_size for p in (path, data_path(path)) if p.exists())
    operators, decomposed = metadata["operators"], metadata["decomposed"]
    seconds = {stage: round(taken, 3) for stage, taken in clock.seconds.items()}
    return OnnxSummary(path, size, operators, decomposed, agreement, seconds)


def _check_dtype(ep: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES[ep]:
        allowed = ", ".join(map(_name, DTYPES[ep]))
        raise ConfigError("dtype", _name(dtype), f"{allowed} for ep={ep!r}")


def _check_options(ep: str, logits: str, max_length: int | None) -> None:
    if ep not in PROVIDERS:
        raise ConfigError("ep", ep, f"one of {', '.join(PROVIDERS)}")
    if logits not in LOGITS:
        raise ConfigError("logits", logits, f"one of {', '.join(LOGITS)}")
    if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
        raise ConfigError("max_length", max_length, "an integer of at least 1, or None")


def _metadata(
    optimized: OptimizedModel, form: Functional, model: ir.Model, ep: str, logits: str
) -> dict[str, Any]:
    """Everything but where the data are, which is known once they are written."""
    program, decoding = optimized.program, optimized.program.decoding
    return {
        "format": FORMAT,
        "kind": "module" if decoding is None else "causal_lm",
        "name": program.name,
        "ep": ep,
        "padding": form.padding,
        "logits": logits,
        "passes": list(optimized.report.passes),
        "states": [_state(ports) for ports in form.states],
        "max_positions": form.max_positions,
        "max_chunk": None if decoding is None else decoding.max_chunk,
        "vocab_size": program.meta.get("vocab_size"),
        "operators": count_operators(model),
        "report": report_to_json(optimized.report),
        "config": optimized.config,
        "generation_config": optimized.generation_config,
        "inputs": [_port(port) for port in form.inputs],
        "outputs": [_port(port) for port in form.outputs],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "decomposed": form.decomposed,
        "data": None,
        "sha256": UNSEALED,
    }


def _port(port: Port) -> dict[str, Any]:
    return {"name": port.name, "dtype": _name(port.dtype), "dims": list(port.dims)}


def _state(ports: StatePorts) -> dict[str, Any]:
    spec = ports.spec
    return {
        "name": spec.name,
        "input": ports.input.name,
        "output": ports.output.name,
        "dims": list(ports.input.dims),
        "dtype": _name(spec.dtype),
        "fill": spec.fill,
        "role": spec.role,
        "layer": spec.layer,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(model: ir.Model, metadata: dict[str, Any], path: Path) -> None:
    """Data first, then the graph that refers to it."""
    metadata["data"] = store_data(model, data_path(path))
    model.metadata_props[KEY] = metadata_text(metadata)
    path.write_bytes(ir.to_proto(model).SerializeToString())
    seal(path)


def data_path(path: Path) -> Path:
    """The data file that belongs to an `.onnx` file."""
    return path.with_name(f"{path.name}.data")


def _put_in_place(written: Path, path: Path) -> None:
    """The data first: a graph is never there without them."""
    pairs = [(data_path(written), data_path(path)), (written, path)]
    for source, target in pairs:
        if not source.exists():
            target.unlink(missing_ok=True)
            continue
        source.chmod(permissions(0o666))
        os.replace(source, target)
