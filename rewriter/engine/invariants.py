"""What every rewrite leaves intact: a well-formed graph whose outputs keep shape and dtype."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.engine.shapes import Shapes, same_form
from rewriter.errors import RewriteError
from rewriter.program import Program

__all__ = [
    "check_known",
    "check_outputs",
    "check_program",
    "check_replacement",
    "outputs_of",
]

_PLAIN = frozenset(filter(callable, vars(operator).values())) | {
    torch.sym_max,
    torch.sym_min,
    torch.sym_not,
    torch.sym_float,
    torch.sym_int,
}
"""Python functions a graph may call, on numbers; everything else is an operator with a schema."""


def check_program(program: Program, what: str) -> None:
    """Lint the graph and match its placeholders with the signature and the state.

    Raises:
        RewriteError: names `what` did it and what is wrong.
    """
    try:
        program.finish()
    except (RuntimeError, ValueError) as error:
        raise RewriteError(f"{what} left a malformed graph: {error}") from error
    declared = [spec.name for spec in program.signature.inputs]
    names = {node.name for node in program.placeholders()}
    for name in declared:
        if name not in names:
            raise RewriteError(f"{what} removed the model's input {name!r}")
    if program.decoding is None:
        if names > set(declared):
            raise RewriteError(f"{what} added the input {min(names - set(declared))!r}")
        return
    for spec in program.decoding.states:
        if spec.name not in names:
            raise RewriteError(f"{what} declares state {spec.name!r}, which is no input")


def check_known(node: fx.Node, what: str) -> None:
    """A new node calls an operator that can be printed, saved and lowered.

    Raises:
        RewriteError: it calls something else.
    """
    allowed = "an operator of torch.ops, or a function of the operator module"
    target = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return
    known = isinstance(target, torch._ops.OpOverload) or (callable(target) and target in _PLAIN)
    if node.op != "call_function" or not known:
        raise RewriteError(f"{what} put in {node.op} {target}; allowed: {allowed}")


def check_replacement(old: fx.Node, new: fx.Node, shapes: Shapes, what: str) -> None:
    """The value that took a node's place has its dtype and shape, as its operator computes them.

    Raises:
        RewriteError: it has not.
    """
    before, after = shapes.values.get(old.name), shapes.values.get(new.name)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return
    if before.dtype != after.dtype:
        change = f"{before.dtype} to {after.dtype}"
        raise RewriteError(f"{what} changed the dtype of {old.name}: {change}")
    if before.shape != after.shape:
        change = f"{list(before.shape)} to {list(after.shape)}"
        raise RewriteError(f"{what} changed the shape of {old.name}: {change}")


def check_outputs(program: Program, expected: tuple[Any, ...], shapes: Shapes, what: str) -> None:
    """What the program returns keeps number, dtypes and shapes.

    Args:
        expected: fake values of the outputs before, None where unknown; see `outputs_of`.

    Raises:
        RewriteError: an output differs.
    """
    found = outputs_of(program, shapes)
    if len(found) != len(expected):
        raise RewriteError(f"{what} changed the number of outputs: {len(expected)} to {len(found)}")
    for index, (before, after) in enumerate(zip(expected, found, strict=True)):
        if before is not None and after is not None and not same_form(before, after):
            raise RewriteError(f"{what} changed output {index}: {before} to {after}")


def outputs_of(program: Program, shapes: Shapes) -> tuple[Any, ...]:
    """Fake values of the outputs, None where unknown."""
    outputs = program.graph.output_node().args[0]
    assert isinstance(outputs, tuple | list)
    return tuple(shapes.values.get(node.name) for node in outputs if isinstance(node, fx.Node))
