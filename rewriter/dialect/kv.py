"""Key-value state: append new entries in place."""

from __future__ import annotations

from torch import Tensor

from rewriter.cost.cost import Cost
from rewriter.dialect.registry import dialect_op, nbytes

__all__ = ["kv_append"]


def _fake(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, offset: int) -> None:
    return None


def _cost(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, offset: int) -> Cost:
    return Cost(0.0, 2 * nbytes(k, v), 2)


@dialect_op(
    "kv_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, SymInt offset) -> ()",
    fake=_fake,
    cost=_cost,
)
def kv_append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, offset: int) -> None:
    """Write entries offset .. offset + q_len of both caches.

    Args:
        k_cache, v_cache: bhsd [batch_size, num_kv_heads, capacity, head_dim], mutated.
        k, v: bhsd [batch_size, num_kv_heads, q_len, head_dim]; offset + q_len <= capacity.
    """
    q_len = k.shape[2]
    k_cache.narrow(2, offset, q_len).copy_(k)
    v_cache.narrow(2, offset, q_len).copy_(v)
