"""Find attention in a graph: the fused operator, and a softmax between two products.

A softmax is a candidate when its result enters a matrix product over the axis it normalises and its
input comes, entry by entry, from a product of two tensors that both depend on the inputs. The
softmax of a router or of a pooling is neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from rewriter.engine.miss import Miss
from rewriter.engine.site import bound_arguments
from rewriter.program import Program
from rewriter.raising.insertion import shape_of
from rewriter.raising.mask_samples import Term
from rewriter.raising.score_walk import PRODUCTS, Scores, Unknown, Walk

__all__ = ["SUBJECT", "AttentionRegion", "find_attention"]

aten = torch.ops.aten

SUBJECT = "raise-attention"

_SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
_FUSED = aten.scaled_dot_product_attention.default
_FORWARD = frozenset(
    {
        aten._to_copy.default,
        aten.to.dtype,
        aten.clone.default,
        aten.reshape.default,
        aten.slice.Tensor,
        aten.dropout.default,
        aten.squeeze.dim,
        aten.unsqueeze.default,
    }
)
_FARTHEST = 8


@dataclass(frozen=True)
class AttentionRegion:
    """An attention as it stands in the graph, in the model's own layout.

    Attributes:
        output: the node to replace.
        left: queries [*lead, q_len, head_dim]; right: keys, [*lead, head_dim, kv_len] when
            `keys_transposed`, else [*lead, kv_len, head_dim]; values [*lead, kv_len, width].
        shape: extents of the scores [*lead, q_len, kv_len].
        scores: what lies between the product and the softmax.
        causal: the operator itself hides later entries.
        anchors: the nodes that make it an attention.
    """

    output: fx.Node
    left: fx.Node
    right: fx.Node
    values: fx.Node
    shape: tuple[Any, ...]
    scores: Scores
    keys_transposed: bool
    causal: bool = False
    anchors: tuple[fx.Node, ...] = field(default=())


def find_attention(program: Program) -> Iterator[AttentionRegion | Miss]:
    """Every attention, or for a candidate that is not understood the first differing node."""
    walk = Walk(program)
    for node in list(program.graph.nodes):
        if node.target is _FUSED:
            yield _fused(node)
        elif node.target in _SOFTMAXES:
            yield from _explicit(walk, node)


def _fused(node: fx.Node) -> AttentionRegion | Miss:
    arguments = bound_arguments(node)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    if arguments["dropout_p"]:
        return Miss.at(node, SUBJECT, "attention with dropout")
    scale = arguments["scale"]
    if scale is None:
        scale = 1.0 / math.sqrt(shape_of(query)[-1])
    shape = (*shape_of(query)[:-1], shape_of(key)[-2])
    mask, terms = arguments["attn_mask"], ()
    if mask is not None:
        role = "keep" if mask.meta["val"].dtype == torch.bool else "add"
        terms = (Term(mask, role, shape),)
    causal = bool(arguments["is_causal"])
    if causal and shape_of(query)[-2] != shape_of(key)[-2]:
        return Miss.at(node, SUBJECT, "causal attention over keys of another length")
    scores = Scores(node, float(scale), terms=terms)
    return AttentionRegion(node, query, key, value, shape, scores, False, causal, (node,))


def _explicit(walk: Walk, softmax: fx.Node) -> Iterator[AttentionRegion | Miss]:
    rank = len(shape_of(softmax))
    if not rank or softmax.args[1] % rank != rank - 1:  # pyright: ignore[reportOperatorIssue]
        return
    uses = list(_value_products(softmax))
    if not uses:
        return
    result = walk.back(softmax.args[0], Scores())
    if isinstance(result, Unknown):
        if _has_product(walk, softmax):
            yield Miss.at(result.node, SUBJECT, result.reason)
        return
    for node, sliced in uses:
        if not walk.data_dependent(node.args[1]):
            continue
        if sliced != (result.sinks is not None):
            yield Miss.at(node, SUBJECT, "attention weights are cut without an attention sink")
            continue
        yield _region(softmax, node, result)


def _region(softmax: fx.Node, node: fx.Node, scores: Scores) -> AttentionRegion:
    product = scores.product
    assert product is not None
    left, right = product.args[-2:]
    return AttentionRegion(
        node,
        left,  # pyright: ignore[reportArgumentType]
        right,  # pyright: ignore[reportArgumentType]
        node.args[1],  # pyright: ignore[reportArgumentType]
        shape_of(product),
        scores,
        keys_transposed=True,
        anchors=(softmax, product, node),
    )


def _value_products(softmax: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """Products of the weights with values, and whether the weights were cut before."""
    frontier, seen = [(softmax, False, 0)], {softmax}
    while frontier:
        node, sliced, depth = frontier.pop(0)
        for user in node.users:
            if user.target in PRODUCTS and user.args[-2] is node:
                yield user, sliced
            elif user.target in _FORWARD and user not in seen and depth < _FARTHEST:
                seen.add(user)
                cut = user.target is aten.slice.Tensor and shape_of(user) != shape_of(node)
                same_axis = cut or shape_of(user)[-1:] == shape_of(node)[-1:]
                if same_axis:
                    frontier.append((user, sliced or cut, depth + 1))


def _has_product(walk: Walk, softmax: fx.Node) -> bool:
    """Whether a product of two data-dependent tensors lies close behind, over the same axis."""
    frontier, seen = [softmax], {softmax}
    for _ in range(4 * _FARTHEST):
        if not frontier:
            return False
        node = frontier.pop(0)
        for operand in node.all_input_nodes:
            if operand in seen or shape_of(operand)[-1:] != shape_of(softmax)[-1:]:
                continue
            seen.add(operand)
            if operand.target in PRODUCTS and all(
                walk.data_dependent(a) for a in operand.args[-2:]
            ):
                return True
            frontier.append(operand)
    return False
