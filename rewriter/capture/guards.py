"""What a trace took for granted about sizes, beyond the dimensions it fixed."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from rewriter.errors import InputError
from rewriter.program import InputSpec

__all__ = ["conditions", "demand", "violated"]

_SIZE = re.compile(r"L\['(?P<input>\w+)'\]\.size\(\)\[(?P<dim>\d+)\]")
_SAME_SIZE = re.compile(r"\w+\.shape\[\d+\] == \w+\.shape\[\d+\]")


def conditions(exported: ExportedProgram, inputs: Sequence[InputSpec]) -> tuple[str, ...]:
    """Conditions under which the graph is the model, e.g. `input_ids.shape[1] <= 256`.

    Equal sizes are left out: such dimensions share a name in the signature. Branches of the model
    that were decided by the example's sizes show up here.
    """
    found = [_readable(code) for code in getattr(exported, "_guards_code", [])]
    names = {spec.name for spec in inputs}
    kept = [text for text in dict.fromkeys(found) if not _SAME_SIZE.fullmatch(text)]
    return tuple(text for text in kept if any(name in text for name in names))


def violated(guards: Sequence[str], inputs: Mapping[str, Tensor]) -> str | None:
    """The first condition that these inputs do not meet, or None.

    `a != b` is reported but not enforced: it comes from slices of a table at its own length,
    where the graph stays right.

    Args:
        guards: as `conditions` returns them.
    """
    for guard in (text for text in guards if " != " not in text):
        if not _value(ast.parse(guard, mode="eval").body, inputs):
            return guard
    return None


def demand(guards: Sequence[str], inputs: Mapping[str, Tensor]) -> None:
    """Refuse inputs for which the model takes a path that was not traced.

    Raises:
        InputError: names the first condition that does not hold.
    """
    guard = violated(guards, inputs)
    if guard is not None:
        raise InputError(f"the model takes another path for these sizes; allowed: {guard}")


_COMPARISONS: dict[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "abs": abs}


def _value(node: ast.expr, inputs: Mapping[str, Tensor]) -> Any:
    """The value of a size expression; nothing but arithmetic on sizes is understood."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Subscript(value=ast.Attribute(value=ast.Name(id=name), attr="shape"), slice=index):
            return inputs[name].shape[_value(index, inputs)]
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](_value(left, inputs), _value(right, inputs))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, inputs)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, inputs)
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _COMPARISONS[type(op)](_value(left, inputs), _value(right, inputs))
        case ast.BoolOp(op=op, values=values):
            results = [bool(_value(value, inputs)) for value in values]
            return any(results) if isinstance(op, ast.Or) else all(results)
        case ast.Call(func=ast.Name(id=name), args=args):
            return _FUNCTIONS[name](*(_value(argument, inputs) for argument in args))
    raise ValueError(f"not a size expression: {ast.unparse(node)}")


def _readable(code: str) -> str:
    return _SIZE.sub(r"\g<input>.shape[\g<dim>]", code)
