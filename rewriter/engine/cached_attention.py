"""What passes on attention look at: its extents and its cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rewriter.cost.work import Work, dtype_name
from rewriter.dialect import OPS
from rewriter.engine.miss import Miss
from rewriter.engine.site import Site, bound_arguments
from rewriter.program import Program

__all__ = [
    "TYPICAL_KV_LEN",
    "AttentionShape",
    "CachedAttention",
    "attention_shape",
    "cached_attention",
]

aten = torch.ops.aten

TYPICAL_KV_LEN = 1024
"""Entries that the predicted cost of a decode step assumes."""


@dataclass(frozen=True)
class AttentionShape:
    """Static extents of an attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    def decode_operands(self, kv_len: int, batch_size: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Meta tensors q, k, v of one decoded token against kv_len entries, for costs."""
        extents = (
            (self.num_heads, 1, self.head_dim),
            (self.num_kv_heads, kv_len, self.head_dim),
            (self.num_kv_heads, kv_len, self.value_dim),
        )
        q, k, v = (torch.empty(batch_size, *e, dtype=self.dtype, device="meta") for e in extents)
        return q, k, v

    def decode_work(self, operator: str, kv_len: int, batch_size: int = 1) -> Work:
        """One decoded token against kv_len entries, all of which it sees, for predicted times.

        Args:
            operator: `attention`, `grouped_attention` or `streaming_attention`.
        """
        q, k, v = self.decode_operands(kv_len, batch_size)
        new = (q, k[:, :, :1], v[:, :, :1]) if operator == "streaming_attention" else ()
        sizes = {
            "batch_size": batch_size,
            "q_len": 1,
            "kv_len": kv_len,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
        }
        cost = OPS[operator].cost(*(*new, k, v) if new else (q, k, v), mask="full")
        dtype = dtype_name(self.dtype)
        return Work(operator, cost, sizes, dtype, dtype)


def attention_shape(site: Site) -> AttentionShape:
    """Extents of an attention site; its cached keys and values need no traced shape."""
    q, k, v = (_tensor_like(site.program, site.arguments[name]) for name in ("q", "k", "v"))
    return AttentionShape(int(q[1]), int(k[1]), int(q[3]), int(v[3]), _dtype(site.arguments["q"]))


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def _tensor_like(program: Program, node: fx.Node) -> tuple[int | torch.SymInt | str, ...]:
    """Extents of a node, read off the state it is a view of when it was never traced."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return tuple(value.shape)
    state = node.args[0] if node.target is aten.slice.Tensor else node
    assert program.decoding is not None and isinstance(state, fx.Node)
    return program.decoding.state(state.name).dims


@dataclass(frozen=True)
class CachedAttention:
    """An attention over dense entries that a program keeps for itself.

    Attributes:
        append: the `kv_append` that writes the new entries.
        k, v: the new entries, bhsd [batch_size, num_kv_heads, q_len, width].
        k_state, v_state: the placeholders of the state.
        views: the slices through which the attention reads it.
    """

    append: fx.Node
    k: fx.Node
    v: fx.Node
    k_state: fx.Node
    v_state: fx.Node
    views: tuple[fx.Node, fx.Node]


def cached_attention(site: Site, subject: str) -> CachedAttention | Miss:
    """The cache of an attention site, when this attention alone appends to it and reads it."""
    node = site.node
    assert node is not None
    states: list[fx.Node] = []
    for name in ("k", "v"):
        view = site.arguments[name]
        source = view.args[0] if view.target is aten.slice.Tensor else view
        if source.op != "placeholder":
            return Miss.at(
                view, subject, f"{name} is not read from a decoding state", site=site.label
            )
        shared = [u for u in view.users if u is not node]
        if shared:
            reason = f"its {'keys' if name == 'k' else 'values'} are shared with another attention"
            return Miss.at(shared[0], subject, reason, site=site.label)
        states.append(source)
    appends = [u for u in states[0].users if u.target is OPS["kv_append"].overload]
    views = (site.arguments["k"], site.arguments["v"])
    for state in states:
        others = [u for u in state.users if u not in (*appends, *views)]
        if len(appends) != 1 or others:
            reason = f"{state.name} has other readers or writers than this attention"
            return Miss.at((others or appends or [node])[0], subject, reason, site=site.label)
    new = bound_arguments(appends[0])
    return CachedAttention(appends[0], new["k"], new["v"], states[0], states[1], views)
