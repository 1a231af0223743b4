"""Models that count positions themselves: find them, and read from `position_ids` instead."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from rewriter.decoding.mixing import by_token, differs, probe_tokens, run_alone
from rewriter.program import Program

__all__ = ["own_positions", "read_positions"]

ROWS, LENGTH = 2, 13
SUFFIXES = (5, 12)
"""Where the suffixes of a probe start: several tokens, and one alone."""

aten = torch.ops.aten
POINTWISE = frozenset(
    {
        aten.add.Tensor,
        aten.add.Scalar,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten._to_copy.default,
        aten.to.dtype,
        aten.clone.default,
        aten.contiguous.default,
    }
)
RESHAPES = frozenset(
    {aten.view.default, aten.reshape.default, aten.expand.default, aten._unsafe_view.default}
)


def own_positions(program: Program) -> fx.Node | None:
    """The first operator that computes otherwise in a suffix, at its true positions, than in the whole.

    Attention stands aside, so a difference means that the model counts positions of its own, or looks at
    how many tokens a call brings. None when there is none at the outputs.
    """
    ids = probe_tokens(program, ROWS, LENGTH, seed=1)
    device = next((p.device for p in program.module.parameters()), ids.device)
    positions = torch.arange(LENGTH, device=device).expand(ROWS, -1).contiguous()
    ids = ids.to(device)
    whole = run_alone(program, ids, positions)
    for start in SUFFIXES:
        suffix = run_alone(program, ids[:, start:], positions[:, start:].contiguous())

        def moved(node: fx.Node, start: int = start, suffix: dict[fx.Node, Any] = suffix) -> bool:
            full = by_token(whole[node], ROWS, LENGTH)
            part = by_token(suffix[node], ROWS, LENGTH - start)
            if full is None or part is None:
                return False
            return differs(full[:, start:], part)

        if any(moved(node) for node in program.graph.output_node().all_input_nodes):
            calls = (node for node in program.graph.nodes if node.op == "call_function")
            return next(node for node in calls if moved(node))
    return None


def read_positions(program: Program) -> bool:
    """Replace every `arange` over the tokens that feeds token data by `position_ids`, in place.

    Returns:
        whether anything was replaced; the caller checks that the program still computes the same.
    """
    counters = [node for node in program.calls(aten.arange.default) if _counts_tokens(node)]
    counters += [node for node in program.calls(aten.arange.start) if _counts_tokens(node)]
    positions = program.placeholder("position_ids") or _add_positions(program)
    for counter in counters:
        _substitute(program.graph, counter, positions)
    program.finish()
    return bool(counters)


def _counts_tokens(node: fx.Node) -> bool:
    """arange(q_len), arange(0, q_len): its length is the number of tokens."""
    first: Any = node.args[0]
    if node.target is aten.arange.start and first != 0:
        return False
    length = node.args[-1]
    if not isinstance(length, fx.Node) or length.target is not aten.sym_size.int:
        return False
    source, dim = length.args
    of_tokens = isinstance(source, fx.Node) and source.name in ("input_ids", "position_ids")
    return of_tokens and bool(dim == 1)


def _add_positions(program: Program) -> fx.Node:
    with program.graph.inserting_after(program.placeholders()[-1]):
        node = program.graph.placeholder("position_ids")
    ids = program.placeholder("input_ids")
    node.meta = dict(ids.meta) if ids is not None else {}
    return node


def _substitute(graph: fx.Graph, counter: fx.Node, positions: fx.Node) -> None:
    """Carry [batch_size, q_len] positions through what was computed from [q_len] ones."""
    with graph.inserting_before(counter):
        typed = positions
        if counter.kwargs.get("dtype") not in (None, torch.int64):
            typed = graph.call_function(
                aten._to_copy.default, (positions,), {"dtype": counter.kwargs["dtype"]}
            )
    pending = [(counter, typed)]
    while pending:
        old, new = pending.pop()
        for user in list(old.users):
            if _only_adds_a_row(user):
                pending.append((user, new))
            elif user.target in POINTWISE and _is_row(user):
                with graph.inserting_before(user):
                    twin = graph.create_node(
                        user.op, user.target, _swap(user.args, old, new), dict(user.kwargs)
                    )
                twin.meta = {k: v for k, v in user.meta.items() if k != "val"}
                pending.append((user, twin))
            else:
                user.replace_input_with(old, new)


def _only_adds_a_row(node: fx.Node) -> bool:
    """Whether it turns [q_len] into [1, q_len], which positions of a batch already are."""
    if node.target in RESHAPES:
        return _is_row(node)
    if node.target is aten.slice.Tensor:
        return node.args[1:] == (0,)
    return node.target is aten.unsqueeze.default and node.args[1:] == (0,)


def _is_row(node: fx.Node) -> bool:
    """Whether it holds one value a token: [q_len] or [1, q_len]."""
    value = node.meta.get("val")
    if value is None or value.dim() not in (1, 2):
        return False
    return value.dim() == 1 or value.shape[0] == 1 or not isinstance(value.shape[0], int)


def _swap(args: tuple[Any, ...], old: fx.Node, new: fx.Node) -> tuple[Any, ...]:
    return tuple(new if operator.is_(a, old) else a for a in args)
