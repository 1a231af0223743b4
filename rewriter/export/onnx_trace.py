"""A functional module traced and translated to an ONNX graph whose batch and lengths are dynamic."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from codegen.onnx_functions.node import OPSET
from rewriter.errors import ExportError
from rewriter.export.ports import Port

__all__ = ["torch_dtype", "trace", "translate", "with_dtypes"]

EXTENTS = {"batch": 2, "q_len": 5, "past": 11, "total": 16, "tokens": 10}
"""Sizes that tracing sees; what it computes holds for others too."""


def trace(
    module: nn.Module, inputs: Sequence[Port], examples: Sequence[Tensor] | None = None
) -> torch.export.ExportedProgram:
    """Trace a module without state.

    Args:
        examples: of the inputs; None for those of a language model.

    Raises:
        ExportError: an operator cannot be traced, or fixes a dimension that has to be dynamic.
    """
    arguments = tuple(map(_example, inputs) if examples is None else examples)
    dynamic = tuple(
        {i: torch.export.Dim.AUTO for i, dim in enumerate(port.dims) if isinstance(dim, str)}
        for port in inputs
    )
    try:
        with quiet(), torch.no_grad():
            exported = torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # the tracer raises whatever the operators do
        raise ExportError(f"the program cannot be traced: {_first_line(error)}") from error
    _check_dynamic(exported, inputs)
    return exported


def _example(port: Port) -> Tensor:
    shape = [EXTENTS[dim] if isinstance(dim, str) else dim for dim in port.dims]
    if port.name == "attention_mask":
        return torch.ones(shape, dtype=torch.int64)
    if port.name == "position_ids":
        return torch.arange(shape[1]).expand(shape).contiguous()
    return torch.zeros(shape, dtype=port.dtype)


def _check_dynamic(exported: torch.export.ExportedProgram, inputs: Sequence[Port]) -> None:
    user = set(exported.graph_signature.user_inputs)
    nodes = [node for node in exported.graph.find_nodes(op="placeholder") if node.name in user]
    for port, node in zip(inputs, nodes, strict=True):
        for dim, extent in zip(port.dims, node.meta["val"].shape, strict=True):
            if isinstance(dim, str) and isinstance(extent, int):
                raise ExportError(f"tracing fixed {dim} of {port.name} at {extent}")


def translate(
    exported: torch.export.ExportedProgram, inputs: Sequence[Port], outputs: Sequence[Port]
) -> ir.Model:
    """The ONNX graph. Raises ExportError for an operator that has no translation."""
    names: dict[str, Any] = {
        "input_names": [port.name for port in inputs],
        "output_names": [port.name for port in outputs],
    }
    try:
        with quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                opset_version=OPSET,
                optimize=True,
                verbose=False,
                **names,
            )
    except Exception as error:
        raise ExportError(f"an operator has no ONNX translation: {_cause(error)}") from error
    return program.model


def torch_dtype(dtype: ir.DataType) -> torch.dtype:
    """PyTorch's name for it."""
    names = {"FLOAT": "float32", "DOUBLE": "float64"}
    return getattr(torch, names.get(dtype.name, dtype.name.lower()))


def with_dtypes(ports: Sequence[Port], model: ir.Model) -> tuple[Port, ...]:
    """The outputs with the dtypes that the graph gives them."""
    found = [value.dtype for value in model.graph.outputs]
    return tuple(
        port if dtype is None else replace(port, dtype=torch_dtype(dtype))
        for port, dtype in zip(ports, found, strict=True)
    )


def _cause(error: BaseException) -> str:
    """The innermost message: the outer ones tell how to file a bug."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter talks about packages that are not installed and about its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
