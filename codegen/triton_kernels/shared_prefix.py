"""Decode attention of requests that begin with the same tokens, whose entries are stored and read once.

    attn(q_b, [P; S_b]) = merge(attn(q_b, P), attn(q_b, S_b))

The queries of all requests are rows of one product with the prefix, so its keys and values are read once
and meet tensor cores as tiles of many rows; each request attends to its own suffix as usual; the
partial outputs of both meet in one merge. Exact, but for the order of rounding.

Layouts: q bhsd [batch_size, num_heads, q_len, head_dim]; prefix [num_kv_heads, prefix_len, d]; suffixes
in any layout of `entries`. Partial outputs fp32 [splits of the prefix + splits of the suffixes, batch_size,
num_heads, q_len, value_dim]. Kernels: `decode_attention` twice and `merge_lse`; what one program computes
is said there. Bytes moved: the prefix once for every `block_m` rows, suffixes once, partial outputs twice.
Source: https://arxiv.org/abs/2402.05099
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from codegen.kernel import Kernel, KernelDescription
from codegen.triton_kernels.attention_limits import (
    check_cache,
    check_tensors,
    query_positions,
    refusal,
    require,
    value_width,
)
from codegen.triton_kernels.decode_attention import (
    DECODE_ATTENTION,
    attend_splits,
    choose_splits,
    decode_cost,
    merging,
)
from codegen.triton_kernels.entries import capacity, gathered, index_of
from codegen.triton_kernels.merge_lse import merge_lse
from codegen.triton_kernels.visibility import structure
from codegen.triton_kernels.whole_softmax import probabilities
from rewriter.cost.cost import Cost
from rewriter.dialect.attention import repeat_kv
from rewriter.errors import InputError

__all__ = [
    "SHARED_PREFIX",
    "SharedPrefix",
    "shared_prefix_attention",
    "shared_prefix_cost",
    "shared_prefix_reference",
]


class SharedPrefix(Kernel):
    """`shared_prefix_attention` as Triton text: the part over the prefix. The layout of a description
    is that of the suffixes; its mask is `"causal"` or `"full"`, because every query sees the prefix."""

    operator: ClassVar[str] = "shared_prefix_attention"
    backend: ClassVar[str] = "triton"

    def supports(self, description: KernelDescription) -> str | None:
        """See `Kernel.supports`."""
        return refusal(description, masks=("causal", "full"))

    def source(self, description: KernelDescription) -> str:
        """See `Kernel.source`."""
        require(self, description)
        return DECODE_ATTENTION.source(_over_prefix(description))


SHARED_PREFIX = SharedPrefix()


def _over_prefix(description: KernelDescription) -> KernelDescription:
    whole = replace(description, operator="decode_attention", form="shared", mask="full")
    return replace(whole, layout="bhsd", page_size=0)


def _over_suffixes(description: KernelDescription) -> KernelDescription:
    return replace(description, operator="decode_attention")


def shared_prefix_attention(
    description: KernelDescription,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None = None,
    *,
    softmax_scale: float,
    kv_lens: Tensor | None = None,
    k_positions: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q over the prefix and each request's own suffix.

    Args:
        q: bhsd [batch_size, num_heads, q_len, head_dim].
        prefix_k, prefix_v: [num_kv_heads, prefix_len, head_dim or value_dim].
        k, v: suffixes, a cache in the described layout (see `entries`).
        q_positions: int64 [batch_size, q_len], counted from the start of the suffix, -1 = padding;
            None = the last q_len of the suffixes' capacity.
        kv_lens: int64 [batch_size], entries of each suffix, 0 being allowed; None = the capacity.
        k_positions: of `slots`, counted in the same way; block_table: of `paged`.
        num_splits: of the prefix and of the suffixes; None = from the device.

    Returns:
        out bhsd [batch_size, num_heads, q_len, value_dim] in q's dtype, and lse fp32
        [batch_size, num_heads, q_len].

    Raises:
        InputError: tensors that are not as described.
    """
    check_tensors(description, q=q, k=k, v=v)
    if prefix_k.dim() != 3 or prefix_v.dim() != 3:
        told = f"{tuple(prefix_k.shape)} and {tuple(prefix_v.shape)}"
        raise InputError(f"prefix: shapes {told}, allowed: [num_kv_heads, prefix_len, d]")
    prefix = (prefix_k.unsqueeze(0), prefix_v.unsqueeze(0))
    check_tensors(description, q=q, k=prefix[0], v=prefix[1])
    (batch_size, num_heads, q_len, _), prefix_len = q.shape, prefix_k.shape[1]
    suffix_len = capacity(description.layout, k, block_table)
    positions = query_positions(q, q_positions, suffix_len)
    if kv_lens is None:
        kv_lens = torch.full((batch_size,), suffix_len, device=q.device)
    index = index_of(description.layout, kv_lens, k_positions, block_table)
    check_cache(description, q, k, v, index[0], kv_lens=kv_lens)
    shared, own = _over_prefix(description), _over_suffixes(description)
    if num_splits is None:
        programs = batch_size * k.shape[1]
        num_splits = (
            choose_splits(shared, programs, prefix_len, q),
            choose_splits(own, programs, suffix_len, q),
        )
    shape = (sum(num_splits), batch_size, num_heads, q_len, value_width(description))
    out = q.new_empty(shape, dtype=torch.float32)
    lse = out.new_empty(shape[:-1])
    (first, rest), (first_lse, rest_lse) = (x.split(list(num_splits)) for x in (out, lse))
    lens = torch.full((1,), prefix_len, device=q.device)
    unread = index_of("bhsd", lens, None, None)
    scale = softmax_scale
    attend_splits(
        shared, q, *prefix, first, first_lse, positions, unread, lens, softmax_scale=scale
    )
    attend_splits(own, q, k, v, rest, rest_lse, positions, index, kv_lens, softmax_scale=scale)
    return merge_lse(merging(description), out, lse)


def shared_prefix_reference(
    description: KernelDescription,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    *,
    softmax_scale: float,
    index: Tensor,
    kv_lens: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch: one softmax over the prefix, repeated, and the suffix."""
    d, shape = description, (q.shape[0], -1, -1, -1)
    k, positions = gathered(d.layout, k, index, kv_lens)
    v, _ = gathered(d.layout, v, index, kv_lens)
    k, v = (torch.cat((p.expand(shape), x), 2) for p, x in ((prefix_k, k), (prefix_v, v)))
    own = structure(q_positions.unsqueeze(1), positions, d.mask, 0, 0)
    seen = (q_positions >= 0)[:, None, :, None].expand(*own.shape[:3], prefix_k.shape[1])
    weights, lse = probabilities(d, q, k, torch.cat((seen, own), -1), softmax_scale)
    return weights @ repeat_kv(v.float(), q.shape[1]), lse


def shared_prefix_cost(
    description: KernelDescription,
    batch_size: int,
    num_heads: int,
    q_len: int,
    prefix_len: int,
    suffix_len: int,
) -> Cost:
    """The arithmetic of attention over both; the prefix read once for the whole batch."""
    own, full = _over_suffixes(description), _over_prefix(description)
    both = decode_cost(full, 1, num_heads, batch_size * q_len, prefix_len)
    return both + decode_cost(own, batch_size, num_heads, q_len, suffix_len) + Cost(launches=-1)
