"""`torch.compile(model, backend="rewriter")`: raise a traced graph, rewrite it exactly, check it, run it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from passes import DEFAULT, PASSES
from rewriter.engine.pipeline import apply_passes
from rewriter.engine.spec_text import parse_spec
from rewriter.program import InputSpec, Program, Signature
from rewriter.raising import raise_program
from rewriter.verify.compare import relative_error
from rewriter.verify.tolerances import END_TO_END

__all__ = ["rewriter_backend"]

log = logging.getLogger("rewriter")


def rewriter_backend(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A torch.compile backend: exact rewrites only, checked on random inputs of the traced shapes.

    For inference: with gradients enabled, or where a graph cannot be raised or comes out different, the
    graph runs as it was traced and the log says why.
    """
    if torch.is_grad_enabled() and any(_needs_grad(value) for value in example_inputs):
        return _as_traced(module, "gradients are enabled; call it under torch.no_grad()")
    try:
        traced = make_fx(module, pre_dispatch=True, tracing_mode="real")(*example_inputs)
        with unset_fake_temporarily():  # raising and checking compute with real numbers
            return _rewritten(module, traced, example_inputs)
    except Exception as error:  # the user's model runs whatever we fail to understand
        return _as_traced(module, f"{type(error).__name__}: {error}")


def _needs_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _as_traced(module: fx.GraphModule, reason: str) -> Callable[..., Any]:
    log.warning("torch.compile graph left as it was traced: %s", reason)
    return module.forward


def _rewritten(
    module: fx.GraphModule, traced: fx.GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    """The raised and rewritten graph, or the traced one if it computes something else."""
    program = _program(traced)
    raise_program(program)
    passes = [parse_spec(text, PASSES) for text in DEFAULT]
    rewritten = apply_passes(program, passes).program
    problem = _difference(module, rewritten.module, example_inputs)
    if problem:
        return _as_traced(module, problem)
    return rewritten.module.forward


def _program(module: fx.GraphModule) -> Program:
    """The traced graph as a program; its inputs are flat already."""
    copied = fx.GraphModule(module, fx.Graph())
    copied.graph.output(copied.graph.graph_copy(module.graph, {}))
    copied.recompile()
    names = [node.name for node in copied.graph.find_nodes(op="placeholder")]
    inputs = tuple(
        InputSpec(node.name, node.meta["val"].dtype, tuple(str(d) for d in node.meta["val"].shape))
        for node in copied.graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), Tensor)
    )
    leaves = pytree.tree_structure(((), dict.fromkeys(names)))
    signature = Signature(tuple(names), inputs, {}, leaves, tuple(names), leaves)
    return Program(copied, signature, name="compiled", meta={"kind": "module"})


def _difference(
    before: fx.GraphModule, after: fx.GraphModule, example_inputs: Sequence[Any]
) -> str:
    """Run both on the same real inputs; where they differ, or ""."""
    inputs = [_real(value) for value in example_inputs]
    with torch.no_grad():
        expected, found = before(*inputs), after(*inputs)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(b, Tensor):
            allowed = END_TO_END.get(b.dtype, 0.0)
            error = relative_error(a, b)
            if not error <= allowed:
                return f"an output differs by {error:.1e} (allowed {allowed:.0e})"
    return ""


def _real(value: Any) -> Any:
    """A random tensor like a (fake) one; sizes as numbers."""
    if isinstance(value, torch.SymInt):
        return int(value)
    if not isinstance(value, Tensor):
        return value
    shape = [int(extent) for extent in value.shape]
    if value.is_floating_point():
        return torch.randn(shape, dtype=torch.float32, device=value.device).to(value.dtype) * 0.1
    return torch.zeros(shape, dtype=value.dtype, device=value.device)
