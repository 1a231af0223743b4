"""Rotation of queries and keys with the append behind it, which one kernel does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from codegen.triton_kernels.rotary_append import rotary_append
from codegen.triton_program.ledger import Site
from codegen.wanted_kernels import arguments_of
from rewriter.dialect.kv import kv_append
from rewriter.dialect.rope import rope

__all__ = ["Rotary", "find_rotary", "rotary_site"]

_ROPE = torch.ops.rewriter.rope.default
_ATTENTIONS = (torch.ops.rewriter.attention.default, torch.ops.rewriter.grouped_attention.default)


@dataclass(frozen=True)
class Rotary:
    """An append, the rotation of its keys, that of the queries, and the last of them in the graph."""

    append: fx.Node
    keys: fx.Node
    queries: fx.Node
    last: fx.Node

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What `rotary_site`'s callable takes."""
        given = arguments_of(self.append)
        cos, sin = self.keys.args[1:3]
        caches = given["k_cache"], given["v_cache"]
        return (
            self.queries.args[0],
            self.keys.args[0],
            given["v"],
            cos,
            sin,
            *caches,
            given["offset"],
        )


def find_rotary(append: fx.Node) -> Rotary | str:
    """The parts around a `kv_append` whose keys are a `rope`, or why they do not go together."""
    given = arguments_of(append)
    keys = given["k"]
    if len(keys.users) > 1:
        return "its rotated keys are read elsewhere too"
    readers = [
        user for cache in (given["k_cache"], *given["k_cache"].users) for user in cache.users
    ]
    asking: set[fx.Node] = {reader.args[0] for reader in readers if reader.target in _ATTENTIONS}
    queries = asking.pop() if len(asking) == 1 else append
    same = queries.args[1:] == keys.args[1:] and queries.kwargs == keys.kwargs
    if queries.target != _ROPE or not same:
        return "its queries are not rotated by the same tables"
    last = max(append, queries)
    touching = {*given["k_cache"].users, *given["v_cache"].users, *queries.users} - {append}
    if any(append < user < last for user in touching) or any(u < last for u in queries.users):
        return "its caches are read before the queries are rotated"
    return Rotary(append, keys, queries, last)


def rotary_site(site: Site, interleaved: bool) -> Callable[..., Tensor]:
    """Rotated queries, the caches being written."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        offset: int,
    ) -> Tensor:
        tables = [table.reshape((1,) * (4 - table.dim()) + table.shape) for table in (cos, sin)]
        reason = _why_not(q, k, v, tables[0], k_cache, v_cache)
        if reason is not None:
            site.passed(reason)
            keys = rope.reference(k, cos, sin, interleaved=interleaved)
            kv_append.reference(k_cache, v_cache, keys, v, offset)
            return rope.reference(q, cos, sin, interleaved=interleaved)
        site.ran("rotary_append")
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        cos, sin = (table.squeeze(1) for table in tables)
        return rotary_append(q, k, v, cos, sin, k_cache, v_cache, offset, interleaved=interleaved)

    return run


def _why_not(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, k_cache: Tensor, v_cache: Tensor
) -> str | None:
    if cos.shape[1] != 1 or cos.shape[0] not in (1, q.shape[0]) or cos.shape[2] != q.shape[2]:
        return "rotations by tables of each head"
    if not q.dtype == k.dtype == v.dtype or k_cache.dtype != v_cache.dtype:
        return "rotations of queries, keys and values of several dtypes"
    return None
