"""Entry points to shared objects, by `torch.export` and AOTInductor.

Weights and states are constants that whoever loads the artifact hands over, so all entries share them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.utils import fresh_cache

from codegen.cpp_kernels.compiler import find_compiler
from rewriter.errors import ConfigError, ExportError
from rewriter.export.pt2_entry import FORWARD, Entry
from rewriter.export.pt2_plain import demand_aten

__all__ = ["Compiled", "check_target", "compile_entry"]

_OPTIONS = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.precompile_headers": False,
    "cpp.dynamic_threads": True,
}
"""Constants come from outside; the number of threads is that of the loading process. Compiling the headers
apart takes longer than the two or three compilations of an artifact save by it."""


@dataclass(frozen=True)
class Compiled:
    """An entry as it goes into the file.

    Attributes:
        files: its shared object, source and metadata, by name.
        inputs: name, dtype and dimensions of each, as JSON.
        constants: tensors that it needs besides the weights and states, by name.
    """

    name: str
    files: dict[str, bytes]
    inputs: list[dict[str, Any]]
    constants: dict[str, Tensor]


def check_target(target: str) -> None:
    """Whether this machine can compile for `target`, before the long work.

    Raises:
        ConfigError: an unknown target, one whose device is not here, or no C++ compiler.
    """
    kind, _, arch = target.partition(":")
    if kind not in ("cpu", "cuda") or (kind == "cpu" and arch):
        raise ConfigError("target", target, "cpu, or cuda:sm_NN where there is such a device")
    if kind == "cuda":
        raise ConfigError("target", target, f"cpu: {_why_not_cuda(arch)}")
    if find_compiler() is None:
        allowed = "a C++ compiler, which AOTInductor needs: set CXX, or install g++"
        raise ConfigError("CXX", os.environ.get("CXX"), allowed)


def _why_not_cuda(arch: str) -> str:
    if not torch.cuda.is_available():
        return "this machine has no CUDA device, and kernels are tuned on the device they are for"
    major, minor = torch.cuda.get_device_capability()
    if arch != f"sm_{major}{minor}":
        return f"this machine's CUDA device is sm_{major}{minor}"
    return "CUDA artifacts are not written yet"


def compile_entry(entry: Entry) -> Compiled:
    """Trace and compile one entry.

    Raises:
        ExportError: it cannot be traced for all sizes, is not ATen alone, or cannot be compiled.
    """
    with _quiet(), torch.no_grad():
        try:
            exported = torch.export.export(
                entry.module, entry.example, dynamic_shapes=entry.dynamic_shapes(), strict=False
            )
        except Exception as error:  # whatever a trace can raise
            raise _failed(entry, "traced", error) from error
        _demand_dynamic(entry, exported)
        module = demand_aten(exported).module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        options = {
            **_OPTIONS,
            "aot_inductor.model_name_for_generated_files": entry.name,
            "aot_inductor.metadata": {"inputs": " ".join(spec.name for spec in entry.inputs)},
        }
        try:
            # Names of files in the compiler's cache leave out the extents of constants: an entry for
            # another `max_length` would be taken for this one.
            with fresh_cache():
                made: Any = torch._inductor.aot_compile(module, entry.example, options=options)
                files = {path.name: path.read_bytes() for path in map(Path, made)}
        except Exception as error:
            raise _failed(entry, "compiled", error) from error
    constants = {n: t for n, t in exported.constants.items() if isinstance(t, Tensor)}
    return Compiled(entry.name, files, _inputs(entry), constants)


def _inputs(entry: Entry) -> list[dict[str, Any]]:
    return [
        {
            "name": spec.name,
            "dtype": str(spec.dtype).removeprefix("torch."),
            "dims": list(spec.dims),
        }
        for spec in entry.inputs
    ]


def _failed(entry: Entry, what: str, error: Exception) -> ExportError:
    lines = str(error).strip().splitlines() or [""]
    return ExportError(f"{entry.name} cannot be {what}: {type(error).__name__}: {lines[0]}")


def _demand_dynamic(entry: Entry, exported: torch.export.ExportedProgram) -> None:
    """Every dimension that was to stay dynamic has to have stayed so; those of tokens from 2 on."""
    nodes = exported.graph.find_nodes(op="placeholder")[-len(entry.inputs) :]
    for spec, node in zip(entry.inputs, nodes, strict=True):
        for dim, extent in zip(spec.dims, node.meta["val"].shape, strict=True):
            if not isinstance(dim, str):
                continue
            if not isinstance(extent, torch.SymInt):
                raise ExportError(f"{entry.name} fixed {spec.name}'s {dim} at {extent}")
            lower = exported.range_constraints.get(extent.node.expr)
            if entry.name != FORWARD and lower is not None and int(lower.lower) > 2:
                raise ExportError(f"{entry.name} needs {spec.name}'s {dim} from {lower.lower} on")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the compiler's own use of its own parts warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
