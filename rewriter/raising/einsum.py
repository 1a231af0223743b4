"""Two-operand einsums that are matrix products, spelled as permutations around `matmul`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rewriter.program import Program
from rewriter.raising.insertion import Inserter

__all__ = ["lower_einsums"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Labels:
    """The subscripts of a product: batch, one row, one contracted and one column label."""

    batch: str
    row: str
    contracted: str
    column: str


def lower_einsums(program: Program) -> None:
    """Rewrite every einsum of two operands that is one (batched) matrix product."""
    for node in program.calls(aten.einsum.default):
        equation, operands = node.args[0], node.args[1]
        if isinstance(equation, str) and isinstance(operands, list | tuple) and len(operands) == 2:
            _lower(program, node, equation.replace(" ", ""), operands)


def _lower(program: Program, node: fx.Node, equation: str, operands: Sequence[Any]) -> None:
    if "..." in equation or "->" not in equation:
        return
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    labels = _labels(left, right, out)
    if labels is None:
        return
    insert = Inserter(program, node)
    first = insert.permute(operands[0], _order(left, labels.batch + labels.row + labels.contracted))
    second = insert.permute(
        operands[1], _order(right, labels.batch + labels.contracted + labels.column)
    )
    product = insert.call(aten.matmul.default, first, second)
    product = insert.permute(product, _order(labels.batch + labels.row + labels.column, out))
    node.replace_all_uses_with(product)
    program.graph.erase_node(node)


def _order(have: str, want: str) -> list[int]:
    return [have.index(label) for label in want]


def _labels(left: str, right: str, out: str) -> Labels | None:
    """The labels by their part in the product; None when it is not one matrix product."""
    if any(len(set(part)) != len(part) for part in (left, right, out)):
        return None
    batch = "".join(c for c in out if c in left and c in right)
    row = "".join(c for c in left if c not in right)
    column = "".join(c for c in right if c not in left)
    contracted = "".join(c for c in left if c in right and c not in out)
    single = len(row) == len(column) == len(contracted) == 1
    if not single or set(out) != set(batch + row + column):
        return None
    return Labels(batch, row, contracted, column)
