"""Attention of a step over a ring whose keys are turned to their ranks as they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from codegen.step.attention import AttentionPhases, append, bound, is_given, turned
from codegen.step.text import Parameters
from codegen.step.value import Refusal, Value

if TYPE_CHECKING:
    from codegen.step.plan import Planner

__all__ = ["emit_streaming_attention"]


def emit_streaming_attention(plan: Planner, node: fx.Node) -> Value:
    """`rewriter::streaming_attention` of one new token: store it, turn it, attend over the slots."""
    given = bound(node)
    q, k, v, k_ring, v_ring = (plan.tensor(given[n]) for n in ("q", "k", "v", "k_ring", "v_ring"))
    slots, distance, mask = (plan.tensor(given[n]) for n in ("slots", "distance", "mask"))
    kept = int(k_ring.shape[2]) - 1
    if slots.fixed_shape[1] != 1 or mask.shape[1:] != (1, 1, kept):
        raise Refusal("several new tokens")
    storing = Parameters()
    entry = f"{storing.read(slots)}[batch * {slots.strides[0]}]"
    append(plan, node, [(k_ring, k), (v_ring, v)], storing, entry)
    tables = [plan.tensor(given[n]) for n in ("cos", "sin") if is_given(plan, given.get(n))]
    if tables:
        cos, sin = (table.sliced(2, kept, 1) for table in tables)
        q = turned(plan, node, q, cos, sin, plan.fact(node).dtype)
    code = AttentionPhases(plan, node, q, k_ring.sliced(2, 0, kept), v_ring.sliced(2, 0, kept))
    if tables:
        _rotate_entries(code, tables, bool(given.get("interleaved")))
    code.score("bias", code.parameters.read(mask))
    code.score("bias_batch", str(mask.strides[0]))
    code.score("bias_entry", str(mask.strides[3]))
    span = plan.extent(given.get("span") or 0)
    if span != 0 or is_given(plan, given.get("slopes")):
        code.score("distance", code.parameters.read(distance))
        code.score("distance_batch", str(distance.strides[0]))
        code.score("distance_row", str(distance.strides[1]))
    if span != 0:
        code.score("mask", "rw::Mask::SLIDING_WINDOW")
        code.score("span", str(span))
    code.common(given)
    return code.emit(f"rw::entries_between(0, {kept})", float(given["softmax_scale"]))


def _rotate_entries(code: AttentionPhases, tables: list[Value], interleaved: bool) -> None:
    """Read keys through `rw::RotatedEntries`; tables broadcast to [batch, heads, entries, half]."""
    floats = [
        t if t.place.element == "float" and t.strides[3] == 1 else code.plan.copy(t, code.node)
        for t in tables
    ]
    cos, sin = (t.expanded((code.batch, code.kv_heads, *t.shape[2:])) for t in floats)
    if cos.strides != sin.strides:
        raise Refusal("tables of two layouts")
    pointers = [code.parameters.read(t) for t in (cos, sin)]
    scratch = code.scratch(code.plan.threads * 64 * code.width)
    strides = ", ".join(map(str, cos.strides[:3]))
    code.headers.append("rotated_entries.h")
    code.setup.append(
        f"const rw::RotatedEntries<{code.width}, rw::StridedEntries<{code.element}>> turned{{\n"
        f"    kept, {', '.join(pointers)}, {strides}, {2 * cos.fixed_shape[3]},"
        f" {str(interleaved).lower()}, {scratch}}};"
    )
    code.entries = "turned"
