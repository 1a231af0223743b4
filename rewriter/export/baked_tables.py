"""Rotary tables computed once for every position, so that a file only looks them up."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.dialect import OPS
from rewriter.engine.site import bound_arguments
from rewriter.program import Program
from rewriter.raising.evaluate import UnboundInput, evaluate, needed

__all__ = ["Baked", "bake_tables"]

ROPE = OPS["rope"].overload
RING = OPS["streaming_attention"].overload
ENTRIES = OPS["streaming_entries"].overload
MOST_ROWS = 1 << 18
"""Tables of more positions are left to be computed where they are needed."""
PROBE = (3, 0, 2, 5, 1)
"""Positions at which a table has to read what the graph computes."""


class Baked:
    """Attributes that hold the tables: `(cos, sin, positions)` for the nodes of one rotation."""

    def __init__(self, cos: fx.Node, sin: fx.Node, positions: fx.Node) -> None:
        self.cos, self.sin, self.positions = cos, sin, positions


def bake_tables(program: Program, max_positions: int | None) -> Mapping[fx.Node, Baked]:
    """Tables of every rotation whose angles depend on positions alone, as attributes of the program.

    Args:
        program: is changed: gets the attributes `rotary_cos_0`, `rotary_sin_0`, ...
        max_positions: rows of a table at true positions; None = unknown, those are not baked.

    Returns:
        by the node of the rotation (`rope`, `streaming_attention`).
    """
    made: dict[tuple[fx.Node, fx.Node], Baked | None] = {}
    found: dict[fx.Node, Baked] = {}
    for node in (*program.calls(ROPE), *program.calls(RING)):
        arguments = bound_arguments(node)
        key = (arguments["cos"], arguments["sin"])
        if not all(isinstance(table, fx.Node) for table in key):
            continue
        if key not in made:
            made[key] = _bake(program, key, max_positions, len(made))
        baked = made[key]
        if baked is not None:
            found[node] = baked
    return found


def _bake(
    program: Program, tables: tuple[fx.Node, fx.Node], max_positions: int | None, index: int
) -> Baked | None:
    source = _source(program, tables)
    if source is None:
        return None
    rows = max_positions if source.op == "placeholder" else _ranks(program, source)
    if rows is None or not max(PROBE) < rows <= MOST_ROWS:
        return None
    values = _at(program, tables, source, torch.arange(rows).unsqueeze(0))
    probe = torch.tensor([PROBE])
    if values is None:
        return None
    probed = _at(program, tables, source, probe)
    if probed is None or not all(map(_agree, values, probed)):
        return None
    names = (f"rotary_cos_{index}", f"rotary_sin_{index}")
    nodes = []
    for name, value in zip(names, values, strict=True):
        program.module.register_buffer(name, value.contiguous())
        with program.graph.inserting_before(program.placeholders()[0]):
            nodes.append(program.graph.get_attr(name))
    return Baked(nodes[0], nodes[1], source)


def _source(program: Program, tables: tuple[fx.Node, fx.Node]) -> fx.Node | None:
    """The one node of positions that the tables come from: true ones, or ranks."""
    candidates = [node for node in program.placeholders() if node.name == "position_ids"]
    for call in program.calls(ENTRIES):
        candidates += [u for u in call.users if u.target is operator.getitem and u.args[1] == 3]
    ancestors = set(needed(tables, dict.fromkeys(candidates)))
    used = [c for c in candidates if any(u in ancestors for u in c.users)]
    return used[0] if len(used) == 1 else None


def _ranks(program: Program, ranks: fx.Node) -> int:
    """Ranks that a call can ask for: those of all slots, and of the new tokens behind them."""
    call: Any = ranks.args[0]
    assert program.decoding is not None
    budget: int = call.kwargs["num_sink_tokens"] + call.kwargs["recent_window"]
    return budget + (program.decoding.max_chunk or budget)


def _at(
    program: Program, tables: tuple[fx.Node, fx.Node], source: fx.Node, positions: Tensor
) -> list[Tensor] | None:
    """Both tables [positions, width]; None where they need more than positions."""
    try:
        values = evaluate(program, tables, {source: positions})
    except (UnboundInput, KeyError):
        return None
    shaped = [v for v in values if v.dim() == 4 and v.shape[:3] == (1, 1, positions.shape[1])]
    return [v[0, 0] for v in shaped] if len(shaped) == 2 else None


def _agree(table: Tensor, probed: Tensor) -> bool:
    return torch.allclose(table[list(PROBE)], probed, rtol=0, atol=1e-6)
