"""Positions counted anew: how they enter an attention, and rotary tables at other positions.

Methods that keep part of the entries and number them by their place in the cache store keys before
their rotation; these are the conditions for that, and the edit that goes with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rewriter.dialect import OPS
from rewriter.engine.cached_attention import CachedAttention
from rewriter.engine.miss import Miss
from rewriter.engine.site import Site, bound_arguments
from rewriter.program import Program
from rewriter.raising.evaluate import depends_on, needed
from rewriter.raising.position_tables import POSITIONS, clone_positions
from rewriter.raising.rope import MIXING

__all__ = ["Rotated", "rotated", "tables_at"]

aten = torch.ops.aten
ROPE = OPS["rope"].overload
NORMS = frozenset(
    {
        OPS["rms_norm"].overload,
        OPS["layer_norm"].overload,
        aten.layer_norm.default,
        aten.rms_norm.default,
    }
)


@dataclass(frozen=True)
class Rotated:
    """q and k of an attention before their rotation, and its tables; None = it does not rotate.

    cos and sin are [batch_size or 1, 1, q_len, rotary_dim / 2].
    """

    q: fx.Node
    k: fx.Node
    cos: fx.Node | None = None
    sin: fx.Node | None = None
    interleaved: bool = False


def rotated(site: Site, cached: CachedAttention, subject: str) -> Rotated | Miss:
    """How positions enter q and k, or why they cannot be counted anew."""
    tables, absolute = _position_tables(site.program)
    if absolute is not None:
        added = absolute.target in (aten.add.Tensor, aten.add_.Tensor)
        what = "are added before the keys" if added else f"enter through {absolute.target}"
        reason = f"positions {what}; they cannot be re-positioned"
        return Miss.at(absolute, subject, reason, site=site.label)
    q, k = site.arguments["q"], cached.k
    for name, node in (("q", q), ("k", k)):
        blocked = _other_entry(node, name, tables, site, subject)
        if blocked is not None:
            return blocked
    if q.target is not ROPE and k.target is not ROPE:
        return Rotated(q, k)
    if q.target is not ROPE or k.target is not ROPE:
        reason = "only one of q and k is rotated"
        return Miss.at(cached.append, subject, reason, site=site.label)
    return _by_rope(site, q, k, subject)


def _by_rope(site: Site, q: fx.Node, k: fx.Node, subject: str) -> Rotated | Miss:
    turn_q, turn_k = bound_arguments(q), bound_arguments(k)
    if any(turn_q[name] != turn_k[name] for name in ("cos", "sin", "interleaved")):
        reason = "q and k are rotated by different tables"
        return Miss.at(turn_k["cos"], subject, reason, site=site.label)
    blocker = _uncloneable(site.program, (turn_q["cos"], turn_q["sin"]))
    if blocker is not None:
        reason = "the rotary tables cannot be computed at other positions"
        return Miss.at(blocker, subject, reason, site=site.label)
    rest = (turn_q[name] for name in ("cos", "sin", "interleaved"))
    return Rotated(turn_q["x"], turn_k["x"], *rest)


def _other_entry(
    node: fx.Node, name: str, tables: set[fx.Node], site: Site, subject: str
) -> Miss | None:
    """Why an attention input depends on positions other than by a rotation right before it."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        for source in () if _ends(current) else _tensor_inputs(current):
            if source.target is ROPE:
                reason = f"{current.target} stands between the rotation and {name}"
                return Miss.at(current, subject, reason, site=site.label, blocked_by=(source.name,))
            if source in tables:
                reason = f"positions enter {name} through something that is not a rotation"
                return Miss.at(current, subject, reason, site=site.label)
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return None


def _tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Operands that carry values; sizes do not."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def _ends(node: fx.Node) -> bool:
    """Whether a walk back from q or k ends here: a projection, an embedding, a block, an input."""
    if node.target in NORMS:
        return False
    dialect = getattr(node.target, "namespace", "") == "rewriter"
    return node.op in ("placeholder", "get_attr") or node.target in MIXING or dialect


def _position_tables(program: Program) -> tuple[set[fx.Node], fx.Node | None]:
    """Nodes computed from positions alone, and the first user that is neither that nor `rope`."""
    tables: set[fx.Node] = set()
    first: fx.Node | None = None
    cache: dict[fx.Node, frozenset[str]] = {}
    source = program.placeholder(POSITIONS)
    stack = [] if source is None else [source]
    while stack:
        node = stack.pop()
        tables.add(node)
        for user in node.users:
            known = user in tables or user.target is ROPE
            if known or not isinstance(user.meta.get("val"), Tensor):
                continue
            if depends_on(user, cache) <= {POSITIONS}:
                stack.append(user)
            else:
                first = user if first is None or user < first else first
    return tables, first


def _uncloneable(program: Program, tables: Sequence[fx.Node]) -> fx.Node | None:
    """The first node on the way to rotary tables that could not be computed at other positions."""
    source = program.placeholder(POSITIONS)
    if source is None:
        return tables[0]
    for node in needed(tables, {source: None}):
        counts = node.target in (aten.arange.default, aten.arange.start, aten.arange.start_step)
        if counts or node.op == "placeholder":
            return node
    return next((table for table in tables if not _is_per_position(table)), None)


def _is_per_position(table: fx.Node) -> bool:
    value = table.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == 1


def tables_at(program: Program, tables: Sequence[fx.Node], positions: fx.Node) -> list[fx.Node]:
    """Rotary tables at other positions, right after these; computed once however often it is asked.

    Args:
        tables: position-only nodes, such as cos and sin of `Rotated`.
        positions: int64 [batch_size, n].
    """
    made = [_made(program, (table.name, positions.name), table) for table in tables]
    if all(made):
        return [node for node in made if node is not None]
    source = program.placeholder(POSITIONS)
    assert source is not None
    copies = clone_positions(program, tables, {source: positions}, before=positions.next)
    for table, copy in zip(tables, copies, strict=True):
        copy.meta["table_at"] = (table.name, positions.name)
    return copies


def _made(program: Program, key: tuple[str, str], table: fx.Node) -> fx.Node | None:
    calls = program.graph.find_nodes(op=table.op, target=table.target, sort=False)
    return next((node for node in calls if node.meta.get("table_at") == key), None)
