"""`torch.compile(model, backend="rewriter")`: raise each traced graph, rewrite it, check it.

Dynamo hands over a graph whose weights and sizes are inputs. Recognising operators takes their
values, so the graph is captured again with the weights as attributes, every size read off a tensor,
and numbers in their place. One traced graph may serve several sets of weights (equal layers, compiled
one by one): each set gets a program of its own, and a call whose inputs do not fit runs the graph as
it was traced.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import passes as table  # the names are looked up late: passes import rewriter first
from rewriter.capture.baked import Wanted
from rewriter.capture.call import Call, flatten_call
from rewriter.capture.guards import violated
from rewriter.capture.module import build_program
from rewriter.capture.trace import Trace
from rewriter.engine.pipeline import apply_passes
from rewriter.engine.spec_text import parse_spec
from rewriter.program import Program
from rewriter.raising import raise_program
from rewriter.verify.compare import relative_error
from rewriter.verify.tolerances import END_TO_END

__all__ = ["rewriter_backend"]

log = logging.getLogger("rewriter")

MOST_WEIGHT_SETS = 256
"""Sets of weights that one traced graph is rewritten for; later ones run it as it was traced."""


def rewriter_backend(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A torch.compile backend: passes that keep the function, checked on the first call's inputs.

    For inference. Where gradients are asked for, or a graph cannot be captured or comes out
    different, it runs as it was traced, and the log (`rewriter`, warnings) says why.
    """
    if torch.is_grad_enabled() and any(_needs_gradient(value) for value in example_inputs):
        return _as_traced(module, "gradients are enabled; call it under torch.no_grad()")
    if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
        return _as_traced(module, "autocast is enabled")
    return _CompiledGraph(module, example_inputs)


def _needs_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _as_traced(module: fx.GraphModule, reason: str) -> Callable[..., Any]:
    log.warning("torch.compile graph left as it was traced: %s", reason)
    return module.forward


class _CompiledGraph:
    """What runs in place of a traced graph: a program for each set of weights, or that graph."""

    def __init__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self._traced = module
        self._is_weight = tuple(_is_weight(value) for value in example_inputs)
        self._numbers = _numbers(module)
        self._runs: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._held: list[Any] = []  # an id names a tensor only as long as it lives
        self._add(example_inputs)

    def __call__(self, *inputs: Any) -> Any:
        key = self._key(inputs)
        if key not in self._runs:
            self._add(inputs)
        return self._runs[key](*inputs)

    def _key(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        weights = (id(v) for v, known in zip(inputs, self._is_weight, strict=True) if known)
        return (*weights, *(inputs[i].item() for i in self._numbers))

    def _add(self, inputs: Sequence[Any]) -> None:
        if len(self._runs) >= MOST_WEIGHT_SETS:
            self._runs[self._key(inputs)] = self._traced.forward
            return
        self._held += [v for v, known in zip(inputs, self._is_weight, strict=True) if known]
        run = _rewritten(self._traced, inputs, self._is_weight, self._numbers)
        self._runs[self._key(inputs)] = run


def _is_weight(value: object) -> bool:
    """A parameter, or a buffer, which dynamo marks as an input that stays the same."""
    return isinstance(value, nn.Parameter) or hasattr(value, "_dynamo_static_input_type")


def _numbers(traced: fx.GraphModule) -> tuple[int, ...]:
    """Which inputs are numbers that dynamo passes as tensors, such as a scale that may change."""
    placeholders = traced.graph.find_nodes(op="placeholder")
    return tuple(
        i for i, node in enumerate(placeholders) if node.users and all(map(_item, node.users))
    )


def _item(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "item"


def _rewritten(
    traced: fx.GraphModule,
    inputs: Sequence[Any],
    is_weight: Sequence[bool],
    numbers: Sequence[int],
) -> Callable[..., Any]:
    """The rewritten program behind the signature of the traced graph, or that graph."""
    try:
        with _outside_of_dynamo(), torch.no_grad():
            bound = _BoundGraph(traced, inputs, is_weight, numbers)
            program = _captured(bound, [inputs[i] for i in bound.positions])
            _rewrite(program)
            problem = _difference(
                traced, bound.call(program), bound.concrete(inputs), bound.positions
            )
    except Exception as error:  # the user's model runs whatever we fail to understand
        return _as_traced(traced, f"{type(error).__name__}: {error}")
    return _as_traced(traced, problem) if problem else bound.call(program)


@contextmanager
def _outside_of_dynamo() -> Iterator[None]:
    """Tracing and computing without the compilation around us noticing."""
    with torch._guards.tracing(None), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _BoundGraph(nn.Module):
    """A traced graph with its weights and numbers inside and its sizes read off the other tensors.

    Attributes:
        positions: where its inputs stand among the inputs of the traced graph.
        symbolic: for each of them the dimensions that dynamo keeps dynamic.
    """

    def __init__(
        self,
        traced: fx.GraphModule,
        inputs: Sequence[Any],
        is_weight: Sequence[bool],
        numbers: Sequence[int],
    ) -> None:
        super().__init__()
        self.traced = traced
        self.graph = _with_numbers(traced, {i: inputs[i].item() for i in numbers})
        self.positions: list[int] = []
        self.symbolic: list[tuple[int, ...]] = []
        self._weights: dict[int, str] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        placeholders = traced.graph.find_nodes(op="placeholder")
        for i, (value, known) in enumerate(zip(inputs, is_weight, strict=True)):
            if known:
                self._hold(i, value)
            elif isinstance(value, Tensor) and i not in numbers:
                self.positions.append(i)
        fakes = [node.meta["example_value"] for node in placeholders]
        self.symbolic = [_symbolic(fakes[i]) for i in self.positions]
        for i, fake in enumerate(fakes):
            if i not in self._weights and i not in self.positions and i not in numbers:
                self._sizes[i] = self._place_of(fake, fakes)

    def forward(self, *tensors: Tensor) -> Any:
        """What the traced graph returns, flattened."""
        values: dict[int, Any] = dict(zip(self.positions, tensors, strict=True))
        values |= {i: getattr(self, name) for i, name in self._weights.items()}
        values |= {i: values[at].shape[dim] for i, (at, dim) in self._sizes.items()}
        count = len(self.graph.graph.find_nodes(op="placeholder"))
        return tuple(pytree.tree_leaves(self.graph(*[values.get(i) for i in range(count)])))

    def concrete(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs with sizes as numbers: turning dynamo's own symbol into one would fix it."""
        sizes = {i: inputs[at].shape[dim] for i, (at, dim) in self._sizes.items()}
        return [sizes.get(i, value) for i, value in enumerate(inputs)]

    def call(self, program: Program) -> Callable[..., Any]:
        """The program behind the traced graph's signature; that graph where inputs do not fit."""
        dynamic = any(self.symbolic)

        def run(*inputs: Any) -> Any:
            tensors = [inputs[i] for i in self.positions]
            if dynamic and not _fits(program, tensors):
                return self.traced(*inputs)
            return program.module(*tensors)

        return run

    def _hold(self, index: int, weight: Tensor) -> None:
        self._weights[index] = f"weight_{index}"
        if isinstance(weight, nn.Parameter):
            self.register_parameter(f"weight_{index}", weight)
        else:
            self.register_buffer(f"weight_{index}", weight)

    def _place_of(self, size: Any, fakes: Sequence[Any]) -> tuple[int, int]:
        """The input and dimension that a size is of."""
        for i in self.positions:
            for dim, extent in enumerate(fakes[i].shape):
                if str(extent) == str(size):
                    return i, dim
        raise ValueError(f"input {size} is no tensor and no size of one")


def _with_numbers(traced: fx.GraphModule, numbers: dict[int, float]) -> fx.GraphModule:
    """A copy that computes with these numbers, whatever the inputs at their places are."""
    graph = copy.deepcopy(traced.graph)
    placeholders = graph.find_nodes(op="placeholder")
    for i, number in numbers.items():
        for node in list(placeholders[i].users):
            for user in list(node.users):
                user.args, user.kwargs = fx.map_arg(
                    (user.args, user.kwargs), partial(_put, node, number)
                )
            graph.erase_node(node)
    return fx.GraphModule(traced, graph)


def _put(node: fx.Node, number: float, value: fx.Node) -> Any:
    return number if value is node else value


def _symbolic(fake: Tensor) -> tuple[int, ...]:
    return tuple(dim for dim, size in enumerate(fake.shape) if isinstance(size, torch.SymInt))


def _captured(bound: _BoundGraph, tensors: Sequence[Tensor]) -> Program:
    """The bound graph as a flat program with the dynamic dimensions that dynamo found."""
    call: Call = flatten_call(bound, tuple(tensors))
    wanted: Wanted = dict(zip(call.tensors, bound.symbolic, strict=True))
    shapes = tuple(dict.fromkeys(dims, Dim.AUTO) for dims in bound.symbolic)
    exported = torch.export.export(bound, tuple(tensors), dynamic_shapes=(shapes,), strict=False)
    functional = exported.run_decompositions({})
    return build_program(Trace(functional, call.names, wanted, wanted, "", 0.0), call, "compiled")


def _rewrite(program: Program) -> None:
    """Raise and apply the default passes, in place."""
    outcome = raise_program(program)
    result = apply_passes(program, [parse_spec(text, table.PASSES) for text in table.DEFAULT])
    program.module = result.program.module
    found = ", ".join(f"{c.op} {c.raised}/{c.candidates}" for c in outcome.coverage)
    log.info("torch.compile graph raised: %s; %d rewrites", found or "nothing", len(result.applied))


def _fits(program: Program, tensors: Sequence[Tensor]) -> bool:
    """Whether the inputs have the sizes that the program was captured for."""
    sizes: dict[str, int] = {}
    inputs = program.signature.inputs
    for spec, tensor in zip(inputs, tensors, strict=True):
        for dim, size in zip(spec.dims, tensor.shape, strict=True):
            if (dim if isinstance(dim, int) else sizes.setdefault(dim, size)) != size:
                return False
    named = {spec.name: tensor for spec, tensor in zip(inputs, tensors, strict=True)}
    return violated(program.meta["guards"], named) is None


def _difference(
    before: Callable[..., Any], after: Callable[..., Any], inputs: Sequence[Any], own: Sequence[int]
) -> str:
    """Run both on the same inputs; where results or what they did to their inputs differ, or "".

    `own`: which inputs are neither weights nor sizes; each run gets copies of these.
    """
    results: list[list[Any]] = []
    for run in (before, after):
        copies = list(inputs)
        for i in own:
            copies[i] = copies[i].clone()
        results.append([*pytree.tree_leaves(run(*copies)), *(copies[i] for i in own)])
    for a, b in zip(results[1], results[0], strict=True):
        if not isinstance(b, Tensor):
            continue
        allowed = END_TO_END.get(b.dtype, 0.0)
        error = relative_error(a, b)
        if a.dtype != b.dtype or not error <= allowed:
            return f"a result differs by {error:.1e} (allowed {allowed:.0e})"
    return ""
