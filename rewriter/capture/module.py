"""Capture any exportable module as a `Program`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from rewriter.capture.baked import describe_inputs
from rewriter.capture.call import Call, flatten_call
from rewriter.capture.exported import ExportedModule
from rewriter.capture.flat_graph import flat_graph
from rewriter.capture.guards import conditions
from rewriter.capture.trace import Trace, trace
from rewriter.errors import ConfigError
from rewriter.program import Program, Signature

__all__ = ["capture", "example_inputs_of"]


def capture(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | Tensor | None = None,
    *,
    name: str = "model",
) -> Program:
    """Trace `model` once on example inputs, with dynamic batch and sequence.

    The model is not changed: a copy that shares its weights is traced, in eval mode. Dimensions
    that had to be fixed are in `Program.baked`; `meta["guards"]` lists what else was assumed.

    Args:
        example_inputs: positional arguments, or keyword arguments as a mapping. None: what it
            brings (`example_inputs` attribute, an exported program's own, Hugging Face dummy ids).

    Raises:
        ConfigError: no example inputs, or they do not fit `forward`.
        CaptureError: the model cannot be traced; names the operator and the source line.
    """
    if isinstance(model, ExportedModule):
        return build_program(model.trace(), model.call(), name)
    given = example_inputs_of(model) if example_inputs is None else example_inputs
    call = flatten_call(model, given)
    return build_program(trace(model, call), call, name)


def build_program(traced: Trace, call: Call, name: str) -> Program:
    """The program of a trace: flat graph, signature, and what got fixed."""
    module = flat_graph(traced.exported, traced.names)
    described = describe_inputs(_fake_inputs(module), traced.asked, traced.wanted, traced.reason)
    out_spec: Any = traced.exported.call_spec.out_spec
    signature = Signature(
        parameters=call.parameters,
        inputs=tuple(described.inputs),
        constants=call.constants,
        in_spec=call.in_spec,
        leaf_names=call.names,
        out_spec=out_spec,
    )
    meta = {
        "kind": "module",
        "max_positions": None,
        "export_seconds": traced.export_seconds,
        "guards": conditions(traced.exported, described.inputs),
    }
    return Program(module, signature, name=name, baked=tuple(described.baked), meta=meta)


def _fake_inputs(module: fx.GraphModule) -> dict[str, Tensor]:
    """The fake tensors that the placeholders were traced with."""
    nodes = module.graph.find_nodes(op="placeholder")
    return {node.name: node.meta["val"] for node in nodes}


def example_inputs_of(model: nn.Module) -> tuple[Any, ...] | Mapping[str, Any]:
    """The example inputs a model brings along.

    Raises:
        ConfigError: it brings none.
    """
    carried = getattr(model, "example_inputs", None)
    if carried is not None:
        return carried
    if getattr(model, "main_input_name", "") == "input_ids" and hasattr(model, "dummy_inputs"):
        return model.dummy_inputs  # pyright: ignore
    allowed = (
        "a tuple or dict of inputs (--input-shape on the command line);"
        " only a Hugging Face language model needs none"
    )
    raise ConfigError("example_inputs", None, allowed)
