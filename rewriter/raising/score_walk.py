"""Walk back from a softmax to the product of queries and keys: what happens to the scores.

Each operator on the way is undone: scalars multiply into one scale, sums and masks become terms,
tanh between two scalars is a soft-cap, a concatenated column is an attention sink. The walk fails
with the first node it cannot undo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.program import Program
from rewriter.raising.evaluate import attribute, depends_on, evaluate
from rewriter.raising.insertion import shape_of
from rewriter.raising.mask_samples import MASKED, Role, Term

__all__ = ["PRODUCTS", "Scores", "Unknown", "Walk"]

aten = torch.ops.aten

PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default})
_CASTS = frozenset({aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.alias.default})
_RESHAPES = frozenset(
    {aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.view.default}
)
_PASSED = _CASTS | _RESHAPES
_FLOORS = frozenset(
    {aten.maximum.default, aten.clamp.default, aten.clamp_min.default, aten.max.other}
)
_LONGEST_WALK = 40
_TOO_EARLY = "scores are masked or added to before their soft-cap or scaling"


@dataclass(frozen=True)
class Scores:
    """What was found between the softmax and the product.

    Attributes:
        product: the matrix product of queries and transposed keys.
        scale: multiplies the product; softcap: 0 for none.
        terms: what is added or hides; sinks: the logits of an extra column, a node or None.
        row_scales: tensors that multiply whole rows of scores.
    """

    product: fx.Node | None = None
    scale: float = 1.0
    softcap: float = 0.0
    terms: tuple[Term, ...] = ()
    sinks: fx.Node | None = None
    row_scales: tuple[fx.Node, ...] = ()
    steps: int = 0


@dataclass(frozen=True)
class Unknown:
    """Where a walk ended: the first node that is not understood."""

    node: fx.Node
    reason: str


Result = Scores | Unknown


class Walk:
    """Walks back from softmaxes of one program; dependencies are computed once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.depends: dict[fx.Node, frozenset[str]] = {}
        self.scalars: dict[fx.Node, float | None] = {}
        self.rules: dict[Any, Callable[[fx.Node, Scores], Result]] = {
            **dict.fromkeys(_PASSED, self._pass),
            **dict.fromkeys(PRODUCTS, self._product),
            **dict.fromkeys(_FLOORS, self._floor),
            aten.mul.Tensor: self._mul,
            aten.mul.Scalar: self._mul,
            aten.div.Tensor: self._div,
            aten.div.Scalar: self._div,
            aten.add.Tensor: self._add,
            aten.sub.Tensor: self._sub,
            aten.tanh.default: self._tanh,
            aten.where.self: self._where,
            aten.where.ScalarOther: self._where,
            aten.where.ScalarSelf: self._where,
            aten.masked_fill.Scalar: self._masked_fill,
            aten.masked_fill.Tensor: self._masked_fill,
            aten.cat.default: self._cat,
        }

    def back(self, node: Any, scores: Scores) -> Result:
        """Continue at an operand; `scores` is what was collected so far."""
        if not isinstance(node, fx.Node):
            raise TypeError(f"scores cannot be the constant {node!r}")
        rule = self.rules.get(node.target)
        if rule is None:
            return Unknown(node, f"{node.target} on the way from the softmax to the product")
        if scores.steps > _LONGEST_WALK:
            return Unknown(node, f"no product within {_LONGEST_WALK} operators")
        return rule(node, replace(scores, steps=scores.steps + 1))

    def data_dependent(self, node: Any) -> bool:
        """Whether the node depends on the values of any input."""
        return isinstance(node, fx.Node) and bool(depends_on(node, self.depends))

    def scalar(self, value: Any) -> float | None:
        """A number, or the value of a one-element constant of the graph; None for anything else."""
        if isinstance(value, int | float):
            return float(value)
        if not isinstance(value, fx.Node):
            return None
        if value not in self.scalars:
            self.scalars[value] = self._constant(value)
        return self.scalars[value]

    def _constant(self, node: fx.Node) -> float | None:
        fake = node.meta.get("val")
        if fake is None and node.op == "get_attr":
            fake = attribute(self.program, node)
        if isinstance(fake, torch.SymInt | torch.SymFloat):
            return None
        if isinstance(fake, Tensor) and (
            any(e != 1 for e in fake.shape) or self.data_dependent(node)
        ):
            return None
        if self.data_dependent(node):
            return None
        try:
            return float(evaluate(self.program, [node], {})[0])
        except KeyError:  # it depends on a size
            return None

    def _pass(self, node: fx.Node, scores: Scores) -> Result:
        source = node.args[0]
        keeps = shape_of(source)[-1:] == shape_of(node)[-1:]  # pyright: ignore[reportArgumentType]
        if not keeps:
            return Unknown(node, "the axis of the softmax is reshaped")
        return self.back(source, scores)

    def _product(self, node: fx.Node, scores: Scores) -> Result:
        args = node.args
        if node.target is aten.baddbmm.default:
            added, args = args[0], args[1:]
            beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
            if beta != 0:
                term = Term(added, "add", shape_of(node), scores.scale * float(beta))  # pyright: ignore
                scores = replace(scores, terms=(*scores.terms, term))
            scores = replace(scores, scale=scores.scale * float(alpha))  # pyright: ignore
        if not all(self.data_dependent(operand) for operand in args[:2]):
            return Unknown(node, "a product with a weight, not of queries and keys")
        return replace(scores, product=node)

    def _floor(self, node: fx.Node, scores: Scores) -> Result:
        """A lower bound that only hidden entries reach."""
        x, *bounds = node.args
        low = self.scalar(bounds[0]) if len(bounds) == 1 else None
        if low is None or low > MASKED:
            return Unknown(node, "scores are clamped")
        return self.back(x, scores)

    def _mul(self, node: fx.Node, scores: Scores) -> Result:
        first, second = node.args[:2]
        for x, factor in ((first, second), (second, first)):
            number = self.scalar(factor)
            if number is not None:
                return self.back(x, replace(scores, scale=scores.scale * number))
        for x, factor in ((first, second), (second, first)):
            result = self._mul_tensor(node, x, factor, scores)
            if isinstance(result, Scores):
                return result
        return Unknown(node, "scores are multiplied by a tensor")

    def _mul_tensor(self, node: fx.Node, x: Any, factor: Any, scores: Scores) -> Result:
        """A factor per row is one of the queries; one that varies by entry has to be a mask."""
        if shape_of(factor)[-1:] == (1,):
            return self.back(x, replace(scores, row_scales=(*scores.row_scales, factor)))
        if self.data_dependent(factor):
            return Unknown(node, "scores are multiplied by a tensor")
        term = Term(factor, "gate", shape_of(node))
        return self.back(x, replace(scores, terms=(*scores.terms, term)))

    def _div(self, node: fx.Node, scores: Scores) -> Result:
        number = self.scalar(node.args[1])
        if not number or "rounding_mode" in node.kwargs:
            return Unknown(node, "scores are divided by a tensor")
        return self.back(node.args[0], replace(scores, scale=scores.scale / number))

    def _add(self, node: fx.Node, scores: Scores) -> Result:
        return self._sum(node, scores, float(node.kwargs.get("alpha", 1)))  # pyright: ignore

    def _sub(self, node: fx.Node, scores: Scores) -> Result:
        if self._is_row_maximum(node.args[1], node.args[0]):
            return self.back(node.args[0], scores)
        return self._sum(node, scores, -float(node.kwargs.get("alpha", 1)))  # pyright: ignore

    def _sum(self, node: fx.Node, scores: Scores, sign: float) -> Result:
        """Whichever operand leads to the product is the scores; the other is a term."""
        first, second = node.args[:2]
        if self.scalar(second) is not None or self.scalar(first) is not None:
            constant = self.scalar(second) is not None
            return self.back(first if constant else second, scores)  # softmax ignores a constant
        if scores.softcap or scores.row_scales:
            return Unknown(node, _TOO_EARLY)
        outcome: Result = Unknown(node, "a sum without a product of queries and keys")
        choices = [(first, second, sign)] + ([(second, first, 1.0)] if sign > 0 else [])
        choices.sort(key=lambda choice: not self.data_dependent(choice[0]))
        for x, other, factor in choices:
            if not isinstance(other, fx.Node) or not self.data_dependent(x):
                continue
            term = Term(other, "add", shape_of(node), scores.scale * factor)
            result = self.back(x, replace(scores, terms=(*scores.terms, term)))
            if isinstance(result, Scores):
                return result
            outcome = result
        return outcome

    def _is_row_maximum(self, node: Any, x: Any) -> bool:
        """Whether a node is max over the last axis of x: subtracting it changes no softmax."""
        while isinstance(node, fx.Node) and node.target is not aten.amax.default:
            if node.target is aten.max.dim:
                break
            node = node.args[0] if node.args and "getitem" in str(node.target) else None
        return isinstance(node, fx.Node) and node.args[0] is x and _is_last_axis(node)

    def _tanh(self, node: fx.Node, scores: Scores) -> Result:
        if scores.softcap or scores.row_scales:
            return Unknown(node, "a second tanh")
        return self.back(node.args[0], replace(scores, softcap=scores.scale, scale=1.0))

    def _where(self, node: fx.Node, scores: Scores) -> Result:
        if scores.softcap or scores.row_scales:
            return Unknown(node, _TOO_EARLY)
        condition, first, second = node.args[:3]
        roles: tuple[tuple[Any, Any, Role], ...] = (
            (first, second, "keep"),
            (second, first, "hide"),
        )
        for x, other, role in roles:
            low = self.scalar(other)
            if low is not None and low * scores.scale <= MASKED and isinstance(condition, fx.Node):
                term = Term(condition, role, shape_of(node))
                return self.back(x, replace(scores, terms=(*scores.terms, term)))
        return Unknown(node, "scores are replaced by something other than a very negative constant")

    def _masked_fill(self, node: fx.Node, scores: Scores) -> Result:
        if scores.softcap or scores.row_scales:
            return Unknown(node, _TOO_EARLY)
        low = self.scalar(node.args[2])
        if low is None or low * scores.scale > MASKED:
            return Unknown(
                node, "scores are filled with something other than a very negative constant"
            )
        term = Term(node.args[1], "hide", shape_of(node))  # pyright: ignore[reportArgumentType]
        return self.back(node.args[0], replace(scores, terms=(*scores.terms, term)))

    def _cat(self, node: fx.Node, scores: Scores) -> Result:
        parts = [part for part in node.all_input_nodes if shape_of(part)]
        dim = node.args[1] if len(node.args) > 1 else 0
        last = dim in (-1, len(shape_of(node)) - 1)
        clean = not scores.terms and scores.scale == 1.0 and scores.sinks is None
        if not last or not clean or len(parts) != 2:
            return Unknown(node, "scores are concatenated with something")
        x, sinks = parts
        if shape_of(sinks)[-1] != 1 or self.data_dependent(sinks):
            return Unknown(
                node, "scores are concatenated with something that is no column of logits"
            )
        return self.back(x, replace(scores, sinks=sinks))


def _is_last_axis(node: fx.Node) -> bool:
    dims = node.args[1] if len(node.args) > 1 else []
    last = dims if isinstance(dims, list | tuple) else [dims]
    keepdim = len(node.args) > 2 and bool(node.args[2])
    return keepdim and list(last) in ([-1], [len(shape_of(node)) - 1])
