"""Lower a program to what a backend runs.

`eager` runs the graph's own code with the references called directly and the weights bound: neither a
dispatcher nor an attribute is asked on the way. `inductor` inlines the references of operators that
torch.compile can trace, so that it fuses across them; those that update state or count experts stay
calls. `cpu` sends decode steps through C++ that is generated and compiled for them, and runs the rest
like `eager`. `triton` launches a generated kernel at every operator that one supports, on the GPU where
the weights are, and runs the rest like `eager`.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx, nn

from rewriter.cost.context import current
from rewriter.dialect import OPS
from rewriter.dialect.int8 import Int8Matrix
from rewriter.dialect.linear import linear
from rewriter.dialect.registry import DialectOp
from rewriter.engine.miss import Miss
from rewriter.errors import ConfigError
from rewriter.program import Program

__all__ = ["BACKENDS", "BackendChoice", "Described", "Placed", "choose_backend", "lower"]

BACKENDS = ("auto", "eager", "inductor", "cpu", "triton")
"""Every backend name."""

COMPILE_FROM = 64 * 2**20
"""Bytes of weights from which `auto` compiles decode steps. Smaller ones stay in the cache, where a step
is short beside the seconds that a compilation takes."""


@runtime_checkable
class Described(Protocol):
    """A lowered program that can say what it was made into."""

    def summary(self) -> str:
        """In one line, for the report."""
        ...


@runtime_checkable
class Placed(Protocol):
    """A lowered program that can say which sites no kernel of its backend takes."""

    def misses(self) -> list[Miss]:
        """One for each site, with the reason."""
        ...


@dataclass(frozen=True)
class BackendChoice:
    """The backend that will run, and why."""

    name: str
    reason: str


def choose_backend(requested: str, program: Program | None = None) -> BackendChoice:
    """One rule: what was asked for, or raise; `auto` takes `cpu` where it can and pays, else `eager`.

    Args:
        program: what will be lowered; without it only the request itself is judged.

    Raises:
        ConfigError: an unknown backend, or one that cannot run this program here.
    """
    if requested not in BACKENDS:
        raise ConfigError("backend", requested, f"one of {', '.join(BACKENDS)}")
    if requested in ("eager", "inductor"):
        return BackendChoice(requested, "asked for")
    refusal = _why_not_triton(program) if requested == "triton" else _why_not_cpu(program)
    if requested != "auto":
        if refusal is not None:
            raise ConfigError("backend", requested, refusal)
        return BackendChoice(requested, "asked for")
    if program is not None and _devices(program) == {"cuda"}:
        return BackendChoice(
            "eager", "auto: no GPU timing of whole programs says that `triton` is faster"
        )
    if program is None or refusal is not None:
        return BackendChoice("eager", f"auto: {refusal or 'runs at once'}")
    size = sum(t.nbytes for t in program.module.state_dict().values())
    if size < COMPILE_FROM:
        return BackendChoice(
            "eager",
            f"auto: runs at once; {size / 2**20:.0f} MiB of weights do not pay a compilation",
        )
    reads = f"a decode step reads {size / 2**20:.0f} MiB of weights"
    return _predicted_choice(program) or BackendChoice("cpu", f"auto: {reads}")


def _predicted_choice(program: Program) -> BackendChoice | None:
    """What the model of `costing` says, `cpu` unless it surely loses; None where none is asked."""
    how = current()
    if how is None:
        return None
    from rewriter.cost.step import predict_backends

    told = predict_backends(how.model, program, "eager", "cpu")
    if told is None:
        return None
    name = "eager" if told.slower else "cpu"
    return BackendChoice(name, f"auto: predicted by {told.model}: {told}")


def _why_not_cpu(program: Program | None) -> str | None:
    """What stands against compiled decode steps, as the allowed value; None where nothing does."""
    from codegen.cpp_kernels.compiler import why_no_compiler

    missing = why_no_compiler()
    if missing is not None or program is None:
        return missing
    if program.decoding is None:
        return "a causal language model whose decoding was derived; others run on eager"
    devices = _devices(program)
    return (
        None if devices <= {"cpu"} else f"weights on the CPU, not on {', '.join(sorted(devices))}"
    )


def _devices(program: Program) -> set[str]:
    return {p.device.type for p in program.module.parameters()}


def _why_not_triton(program: Program | None) -> str | None:
    """What stands against Triton kernels, as the allowed value; None where nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "Triton: pip install rewriter[gpu], on Linux"
    from codegen.triton_program import why_not_triton

    return why_not_triton(program)


def lower(program: Program, backend: str) -> Callable[..., Any]:
    """A callable with the placeholders of the program as positional arguments.

    Args:
        program: a finished program; it is not changed.
        backend: "eager", "inductor", "cpu" or "triton", from `choose_backend`.

    Raises:
        ConfigError: "triton" where the weights are on no GPU.
    """
    if backend == "triton":
        return _with_kernels(program)
    if backend in ("eager", "cpu"):
        run = _bound(_inlined(copy.deepcopy(program.graph), OPS.values()), program.module)
        return run if backend == "eager" else _native(program, run)
    traceable = [op for op in OPS.values() if op.traceable and not op.overload._schema.is_mutable]
    graph = _inlined(copy.deepcopy(program.graph), traceable)
    return torch.compile(fx.GraphModule(program.module, graph), dynamic=True)


def _native(program: Program, run: Callable[..., Any]) -> Callable[..., Any]:
    """Decode steps as compiled C++, everything else through `run`."""
    from codegen.step import NativeStep

    assert program.decoding is not None
    growing = {
        spec.name: spec.dims.index("capacity") if "capacity" in spec.dims else None
        for spec in program.decoding.states
    }
    return NativeStep(program.module, growing, run)


def _with_kernels(program: Program) -> Callable[..., Any]:
    """Triton kernels where there are some, references elsewhere."""
    choose_backend("triton", program)  # the weights may have been moved since
    from codegen.triton_program import TritonProgram, place_kernels

    graph = copy.deepcopy(program.graph)
    ledger = place_kernels(graph, program)
    device = next((p.device for p in program.module.parameters()), torch.device("cpu"))
    return TritonProgram(_bound(_inlined(graph, OPS.values()), program.module), ledger, device)


def _inlined(graph: fx.Graph, ops: Iterable[DialectOp]) -> fx.Graph:
    """The graph, changed to call the plain Python references of these operators, and `linear`."""
    references: dict[Any, Callable[..., Any]] = {op.overload: op.reference for op in ops}
    references[torch.ops.aten.linear.default] = linear
    for node in graph.nodes:
        if node.op == "call_function" and node.target in references:
            node.target = references[node.target]
    return _kept_narrow(graph)


def _kept_narrow(graph: fx.Graph) -> fx.Graph:
    """Hands int8 weights as they are to references that multiply with them."""
    multiply = {linear, *(OPS[name].reference for name in ("gated_mlp", "mlp"))}
    for node in graph.find_nodes(op="call_function", target=OPS["dequantize_rows"].reference):
        if all(user.target in multiply for user in node.users):
            node.target, node.kwargs = Int8Matrix, {}
    return graph


def _bound(graph: fx.Graph, owner: nn.Module) -> Callable[..., Any]:
    """The code of a graph with its weights as leading arguments, given once."""
    weights, inputs = list[Any](), dict[str, fx.Node]()
    first = graph.find_nodes(op="placeholder")[0]
    for node in graph.find_nodes(op="get_attr"):
        path = str(node.target)
        if path not in inputs:
            with graph.inserting_before(first):
                inputs[path] = graph.placeholder(path.replace(".", "_"))
            inputs[path].target = inputs[path].name  # a legal name that nothing else has
            weights.append(attrgetter(path)(owner))
        node.replace_all_uses_with(inputs[path])
        graph.erase_node(node)
    return partial(fx.GraphModule(nn.Module(), graph).forward, *weights)
