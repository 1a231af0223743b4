"""Attention kernels against scaled_dot_product_attention, cuDNN and FlexAttention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_case import Call, Case, Size, compiled
from torch import Tensor
from torch.nn import functional

from codegen.kernel import KernelDescription
from codegen.triton_kernels.column_sums import column_sums, column_sums_cost
from codegen.triton_kernels.decode_attention import decode_attention, decode_cost
from codegen.triton_kernels.merge_lse import merge_cost, merge_lse, merge_reference
from codegen.triton_kernels.page_scores import page_scores, page_scores_cost, page_scores_reference
from codegen.triton_kernels.prefill_attention import prefill_attention, prefill_cost
from codegen.triton_kernels.shared_prefix import shared_prefix_attention, shared_prefix_cost
from rewriter.dialect.attention import attention

__all__ = ["cases"]

BF16 = torch.bfloat16


def cases(size: Size) -> Iterator[Case]:
    """All of them."""
    for batch_size, kv_len in ((1, 4096), (1, 32768), (16, 4096)):
        yield _decode(size, size.of(batch_size, 2), size.of(kv_len, 65))
    for q_len in (1024, 8192):
        yield _prefill(size, size.of(q_len, 65))
    yield _shared_prefix(size)
    yield _merge(size)
    yield _column_sums(size)
    yield _page_scores(size)


def _describe(size: Size, operator: str, **fields: object) -> KernelDescription:
    given = {"dtype": BF16, "head_dim": size.of(128, 16), "group_size": 4, "mask": "causal"}
    return KernelDescription(operator=operator, **{**given, **fields})  # type: ignore[arg-type]


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The dialect's meaning in fp32."""
    scale, wide = q.shape[-1] ** -0.5, (q.float(), k.float(), v.float())
    return attention.reference(*wide, softmax_scale=scale, mask="causal")


def _peers(size: Size, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Call]:
    def fused() -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    if size.tiny:
        return {"sdpa": fused}
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return fused()

    flex = torch.compile(flex_attention, dynamic=False)
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2])

    def flexible() -> Tensor:
        return flex(q, k, v, block_mask=mask, enable_gqa=True)

    found = {"sdpa": fused, "flex_attention": flexible, "cudnn": cudnn}
    try:
        cudnn()
    except RuntimeError:  # it does not take this shape on this card
        del found["cudnn"]
    return found


def _tensors(
    size: Size, batch_size: int, q_len: int, kv_len: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    heads, kv_heads, width = size.of(32, 8), size.of(8, 2), size.of(128, 16)
    q = size.randn(batch_size, heads, q_len, width)
    k, v = (size.randn(batch_size, kv_heads, kv_len, width) for _ in range(2))
    return q, k, v, width**-0.5


def _decode(size: Size, batch_size: int, kv_len: int) -> Case:
    q, k, v, scale = _tensors(size, batch_size, 1, kv_len)
    d = _describe(size, "decode_attention")
    return Case(
        "decode_attention",
        f"batch_size={batch_size} heads={q.shape[1]}/{k.shape[1]} kv_len={kv_len} d={q.shape[3]}",
        BF16,
        lambda: decode_attention(d, q, k, v, softmax_scale=scale)[0],
        lambda: _reference(q, k, v),
        decode_cost(d, batch_size, q.shape[1], 1, kv_len),
        _peers(size, q, k, v, causal=False),
    )


def _prefill(size: Size, q_len: int) -> Case:
    q, k, v, scale = _tensors(size, 1, q_len, q_len)
    d = _describe(size, "prefill_attention")
    return Case(
        "prefill_attention",
        f"heads={q.shape[1]}/{k.shape[1]} q_len={q_len} d={q.shape[3]}",
        BF16,
        lambda: prefill_attention(d, q, k, v, softmax_scale=scale)[0],
        lambda: _reference(q, k, v),
        prefill_cost(d, 1, q.shape[1], q_len, q_len),
        _peers(size, q, k, v, causal=True),
    )


def _shared_prefix(size: Size) -> Case:
    batch_size, prefix, suffix = size.of(64, 3), size.of(8192, 33), size.of(256, 7)
    q, k, v, scale = _tensors(size, batch_size, 1, suffix)
    prefix_k, prefix_v = (
        size.randn(k.shape[1], prefix, k.shape[3], dtype=k.dtype) for _ in range(2)
    )
    whole_k, whole_v = (
        torch.cat((first.expand(batch_size, -1, -1, -1), rest), 2)
        for first, rest in ((prefix_k, k), (prefix_v, v))
    )
    d = _describe(size, "shared_prefix_attention")
    return Case(
        "shared_prefix_attention",
        f"batch_size={batch_size} prefix={prefix} suffix={suffix}",
        BF16,
        lambda: shared_prefix_attention(d, q, prefix_k, prefix_v, k, v, softmax_scale=scale)[0],
        lambda: _reference(q, whole_k, whole_v),
        shared_prefix_cost(d, batch_size, q.shape[1], 1, prefix, suffix),
        _peers(size, q, whole_k, whole_v, causal=False),
    )


def _merge(size: Size) -> Case:
    parts_count, rows, width = size.of(16, 3), size.of(4096, 7), size.of(128, 16)
    parts = size.randn(parts_count, rows, width, dtype=torch.float32)
    lses = size.randn(parts_count, rows, dtype=torch.float32)
    d = KernelDescription(operator="merge_lse", head_dim=width)

    def plain(parts: Tensor, lses: Tensor) -> Tensor:
        return merge_reference(parts, lses)[0]

    fused = compiled(size, plain)
    return Case(
        "merge_lse",
        f"parts={parts_count} rows={rows} d={width}",
        torch.float32,
        lambda: merge_lse(d, parts, lses)[0],
        lambda: plain(parts, lses),
        merge_cost(d, parts_count, rows),
        {"torch.compile": lambda: fused(parts, lses)} if fused else {},
    )


def _column_sums(size: Size) -> Case:
    q_len, kv_len = size.of(64, 5), size.of(8192, 65)
    q, k, _, scale = _tensors(size, 1, q_len, kv_len)
    d = _describe(size, "column_sums", form="sum")

    def weights(q: Tensor, k: Tensor) -> Tensor:
        """[1, heads, q_len, kv_len] scores, masked."""
        wide = k.repeat_interleave(4, 1).float()
        scores = q.float() @ wide.transpose(2, 3) * scale
        hidden = torch.ones(q_len, kv_len, device=q.device).triu(kv_len - q_len + 1).bool()
        return scores.masked_fill(hidden, -torch.inf)

    def plain(q: Tensor, k: Tensor) -> Tensor:
        return weights(q, k).softmax(-1).sum(2).unflatten(1, (-1, 4)).sum(2)

    lse = weights(q, k).logsumexp(-1)
    fused = compiled(size, plain)
    return Case(
        "column_sums",
        f"heads={q.shape[1]}/{k.shape[1]} q_len={q_len} kv_len={kv_len}",
        BF16,
        lambda: column_sums(d, q, k, lse, softmax_scale=scale),
        lambda: plain(q, k),
        column_sums_cost(d, 1, q.shape[1], q_len, kv_len),
        {"torch.compile": lambda: fused(q, k)} if fused else {},
    )


def _page_scores(size: Size) -> Case:
    kv_len = size.of(32768, 64)
    q, k, _, scale = _tensors(size, 1, 1, kv_len)
    q = q[:, :, 0]
    d = _describe(size, "page_scores", mask="full", form="max", page_size=16)
    starts = torch.zeros(1, dtype=torch.int64, device=q.device)
    stops = torch.full_like(starts, kv_len)

    def plain(q: Tensor, k: Tensor) -> Tensor:
        return page_scores_reference(
            d, q, k, softmax_scale=scale, starts=starts, stops=stops, index=starts
        )

    return Case(
        "page_scores",
        f"heads={q.shape[1]}/{k.shape[1]} kv_len={kv_len} page_size=16",
        BF16,
        lambda: page_scores(d, q, k, softmax_scale=scale, starts=starts, stops=stops),
        lambda: plain(q, k),
        page_scores_cost(d, 1, q.shape[1], kv_len),
        {"eager": lambda: plain(q, k)},
    )
