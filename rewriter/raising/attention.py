"""Raise attention: the fused operator and the explicit softmax(QKᵀ)V become `rewriter::attention`.

Each region is first replaced on paper: the new nodes are inserted, region and replacement run on
the same random queries, keys and values, and only if they agree does the graph use the new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.engine.miss import Miss
from rewriter.program import Program
from rewriter.raising.agreement import Agreement
from rewriter.raising.attention_regions import SUBJECT, AttentionRegion, find_attention
from rewriter.raising.head_layout import (
    Heads,
    Unsupported,
    heads_of,
    peel_casts,
    peel_scale,
    term_to_bhsd,
    to_bhsd,
)
from rewriter.raising.insertion import Inserter, NoExtent, shape_of
from rewriter.raising.mask_samples import Term
from rewriter.raising.masks import Classifier, MaskStructure
from rewriter.raising.repeated_heads import first_of_groups, peel_repeat
from rewriter.raising.score_walk import Walk
from rewriter.report.report import Coverage

__all__ = ["attention_coverage", "raise_attention"]

aten = torch.ops.aten
ATTENTION = torch.ops.rewriter.attention.default


def raise_attention(program: Program) -> list[Miss]:
    """Replace attentions of a graph in normal form by `rewriter::attention` nodes.

    Returns:
        a miss for each candidate left alone (subject "raise-attention"), and one for each mask that
        stays a tensor (subject "raise-mask").
    """
    raiser = _Raiser(program)
    misses: list[Miss] = []
    for found in find_attention(program):
        misses.extend([found] if isinstance(found, Miss) else raiser.replace(found))
    program.finish()
    return list(dict.fromkeys(misses))


def attention_coverage(program: Program, misses: Sequence[Miss]) -> Coverage:
    """Attentions in the final graph, and the kinds of their masks."""
    nodes = program.calls(ATTENTION)
    missed = sum(miss.subject == SUBJECT for miss in misses)
    kinds = tuple(dict.fromkeys(str(node.meta.get("mask", node.kwargs["mask"])) for node in nodes))
    return Coverage("attention", len(nodes), len(nodes) + missed, kinds)


class _Raiser:
    """Replaces the attentions of one program, one after another."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.walk = Walk(program)
        self.classifier = Classifier(program)
        self.agreement = Agreement(program, self.classifier.sampler)
        self.slopes: list[tuple[str, Tensor]] = []

    def replace(self, region: AttentionRegion) -> Sequence[Miss]:
        """Put the dialect operator in the place of one region, or say why not."""
        insert = Inserter(self.program, region.output)
        try:
            heads = heads_of(region.shape[:-2], _neighbours(region))
            mask = self.classifier.describe(region.scores.terms, heads.count, causal=region.causal)
            new = self._insert(insert, region, heads, mask)
            agrees = self.agreement.holds(region, new, insert.inserted)
        except (Unsupported, NoExtent) as error:
            insert.discard()
            return [Miss.at(region.output, SUBJECT, str(error))]
        if not agrees:
            insert.discard()
            reason = "the region and rewriter::attention differ on random inputs"
            return [Miss.at(region.output, SUBJECT, reason)]
        region.output.replace_all_uses_with(new)
        return mask.misses

    def _insert(
        self, insert: Inserter, region: AttentionRegion, heads: Heads, mask: MaskStructure
    ) -> fx.Node:
        scores = region.scores
        q, q_factor = self._operand(insert, region.left, heads)
        k, k_factor = self._keys(insert, region, heads)
        v = to_bhsd(insert, region.values, heads)
        for factor in scores.row_scales:
            q = insert.call(aten.mul.Tensor, q, term_to_bhsd(insert, factor, region.shape, heads))
        k, v = self._peel(insert, k, v)
        dtype = v.meta["val"].dtype
        sinks = None if scores.sinks is None else _sink_vector(scores.sinks, heads)
        new = insert.call(
            ATTENTION,
            *(peel_casts(q, dtype), peel_casts(k, dtype), v, None, None),
            *(self._bias(insert, mask.bias, heads), sinks, self._slopes(insert, mask.slopes)),
            softmax_scale=scores.scale * (scores.softcap or 1.0) * q_factor * k_factor,
            mask=mask.kind,
            span=mask.span,
            softcap=scores.softcap,
        )
        new.meta["mask"] = str(mask)
        return _as_output(insert, new, region.output)

    def _operand(self, insert: Inserter, x: fx.Node, heads: Heads) -> tuple[fx.Node, float]:
        x, first = peel_scale(insert, x, self.walk.scalar)
        x, second = peel_scale(insert, to_bhsd(insert, x, heads), self.walk.scalar)
        return x, first * second

    def _keys(
        self, insert: Inserter, region: AttentionRegion, heads: Heads
    ) -> tuple[fx.Node, float]:
        x, factor = peel_scale(insert, region.right, self.walk.scalar)
        if not region.keys_transposed:
            k, second = self._operand(insert, x, heads)
            return k, factor * second
        rank = len(shape_of(x))
        if x.target in (aten.transpose.int, aten.permute.default):
            k = to_bhsd(insert, insert.transpose(x, rank - 2, rank - 1), heads)
        else:
            k = insert.transpose(to_bhsd(insert, x, heads), 2, 3)
        k, second = peel_scale(insert, k, self.walk.scalar)
        return k, factor * second

    def _peel(self, insert: Inserter, k: fx.Node, v: fx.Node) -> tuple[Any, Any]:
        """Keys and values before their heads were repeated, when both were repeated alike."""
        peeled = [peel_repeat(self.program, insert, x) for x in (k, v)]
        fewest = min(shape_of(x)[1] for x in peeled)
        groups = [self._first_of_groups(insert, x, fewest) for x in peeled]
        if all(x is not None for x in groups):
            return groups[0], groups[1]
        if shape_of(k)[1] != shape_of(v)[1]:
            raise Unsupported("keys and values have different numbers of heads")
        return k, v

    def _first_of_groups(self, insert: Inserter, x: fx.Node, count: int) -> fx.Node | None:
        if shape_of(x)[1] == count:
            return x
        first = first_of_groups(self.program, insert, x, count)
        if first is not None:
            self.agreement.groups[x] = count
        return first

    def _bias(self, insert: Inserter, terms: Sequence[Term], heads: Heads) -> fx.Node | None:
        """The terms that stay tensors: one sum, or one bool tensor when all of them only hide."""
        keeps = [_keep(insert, t, heads) for t in terms if t.role != "add"]
        added = [_added(insert, t, heads) for t in terms if t.role == "add"]
        keep, bias = None, None
        for node in keeps:
            keep = node if keep is None else insert.call(aten.logical_and.default, keep, node)
        for node in added:
            bias = node if bias is None else insert.call(aten.add.Tensor, bias, node)
        if keep is None or bias is None:
            return bias if keep is None else keep
        return insert.call(aten.where.ScalarOther, keep, bias, float("-inf"))

    def _slopes(self, insert: Inserter, slopes: Tensor | None) -> fx.Node | None:
        """The slopes as a buffer of the program; equal ones are stored once."""
        if slopes is None:
            return None
        name = next((n for n, s in self.slopes if torch.equal(s, slopes)), None)
        if name is None:
            name = f"alibi_slopes_{len(self.slopes)}"
            self.program.module.register_buffer(name, slopes)
            self.slopes.append((name, slopes))
        return insert.attribute(name)


def _neighbours(region: AttentionRegion) -> tuple[fx.Node, ...]:
    """Nodes whose shapes tell batch and heads apart where the products merge them."""
    keys = [region.right, *region.right.all_input_nodes]
    return (region.left, region.values, *keys, region.output, *region.anchors)


def _sink_vector(node: fx.Node, heads: Heads) -> fx.Node:
    """The [num_heads] tensor whose views a column of sink logits is."""
    views = (
        aten.reshape.default,
        aten.expand.default,
        aten.unsqueeze.default,
        aten._to_copy.default,
    )
    while shape_of(node) != (heads.count,):
        if node.target not in views:
            raise Unsupported("the column of sink logits is not one logit per head")
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    return node


def _keep(insert: Inserter, term: Term, heads: Heads) -> fx.Node:
    x = term_to_bhsd(insert, term.node, term.shape, heads)
    if term.role == "hide":
        return insert.call(aten.logical_not.default, x)
    return insert.call(aten.ne.Scalar, x, 0) if term.role == "gate" else x


def _added(insert: Inserter, term: Term, heads: Heads) -> fx.Node:
    x = term_to_bhsd(insert, term.node, term.shape, heads)
    return x if term.factor == 1.0 else insert.call(aten.mul.Tensor, x, term.factor)


def _as_output(insert: Inserter, new: fx.Node, old: fx.Node) -> fx.Node:
    """The dialect operator's bhsd result in the shape and dtype of what it replaces."""
    new = insert.reshape(new, shape_of(old))
    dtype = old.meta["val"].dtype
    if new.meta["val"].dtype != dtype:
        new = insert.call(aten._to_copy.default, new, dtype=dtype)
    return new
