"""Norms, activations, rotation and token merging, against torch.compile and Liger where installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from gpu_case import Call, Case, Size, compiled
from torch import Tensor
from torch.nn import functional

from codegen.triton_kernels.gated_activation import (
    ACTIVATIONS,
    gated_activation,
    gated_activation_cost,
    gated_activation_reference,
)
from codegen.triton_kernels.rms_norm import rms_norm, rms_norm_cost, rms_norm_reference
from codegen.triton_kernels.rotary_append import (
    rotary_append,
    rotary_append_cost,
    rotary_append_reference,
)
from codegen.triton_kernels.token_merge import (
    merge_tokens,
    merge_tokens_reference,
    similarity_cost,
    token_energy,
    token_energy_reference,
    token_match,
    token_match_reference,
)
from rewriter.cost.cost import Cost

__all__ = ["cases"]

BF16 = torch.bfloat16


def cases(size: Size) -> Iterator[Case]:
    """All of them."""
    for rows in (16, 4096):
        yield _norm(size, size.of(rows, 3), residual=False)
        yield _norm(size, size.of(rows, 3), residual=True)
        yield _activation(size, size.of(rows, 3))
    for batch_size in (1, 64):
        yield _rotary(size, size.of(batch_size, 2))
    yield from _merging(size)


def _liger(name: str, attribute: str, size: Size) -> Any:
    """A function of Liger-Kernel, or None where it is not installed or nothing is timed."""
    if size.tiny or importlib.util.find_spec("liger_kernel") is None:
        return None
    return getattr(importlib.import_module(f"liger_kernel.ops.{name}"), attribute).apply


def _norm(size: Size, rows: int, *, residual: bool) -> Case:
    width = size.of(4096, 65)
    x, weight = size.randn(rows, width), size.randn(width)
    added = size.randn(rows, width) if residual else None

    def plain(x: Tensor, weight: Tensor, added: Tensor | None) -> Tensor:
        return rms_norm_reference(x, weight, added, eps=1e-6)[0]

    fused, liger = compiled(size, plain), _liger("rms_norm", "LigerRMSNormFunction", size)
    peers: dict[str, Call] = {}
    if fused:
        peers["torch.compile"] = lambda: fused(x, weight, added)
    if not residual:
        peers["functional.rms_norm"] = lambda: functional.rms_norm(x, (width,), weight, 1e-6)
    if liger and not residual:
        peers["liger"] = lambda: liger(x, weight, 1e-6, 0.0, "llama", False)
    return Case(
        "rms_norm residual" if residual else "rms_norm",
        f"rows={rows} width={width}",
        BF16,
        lambda: rms_norm(x, weight, added, eps=1e-6)[0],
        lambda: plain(x, weight, added),
        rms_norm_cost(x, residual),
        peers,
    )


def _activation(size: Size, rows: int) -> Case:
    width = size.of(14336, 65)
    gate, up = size.randn(rows, 2 * width).chunk(2, 1)

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    fused, liger = compiled(size, plain), _liger("swiglu", "LigerSiLUMulFunction", size)
    peers: dict[str, Call] = {"eager": lambda: plain(gate, up)}
    if fused:
        peers["torch.compile"] = lambda: fused(gate, up)
    if liger:
        whole = gate.contiguous(), up.contiguous()
        peers["liger"] = lambda: liger(*whole)
    return Case(
        "gated_activation",
        f"rows={rows} width={width} silu",
        BF16,
        lambda: gated_activation(gate, up, activation=ACTIVATIONS["silu"]),
        lambda: gated_activation_reference(gate, up, activation=ACTIVATIONS["silu"]),
        gated_activation_cost(gate),
        peers,
    )


def _rotary(size: Size, batch_size: int) -> Case:
    heads, kv_heads, width, capacity = (
        size.of(32, 4),
        size.of(8, 2),
        size.of(128, 16),
        size.of(4096, 9),
    )
    q = size.randn(batch_size, heads, 1, width)
    k, v = (size.randn(batch_size, kv_heads, 1, width) for _ in range(2))
    angle = torch.rand(1, 1, width // 2, device=size.device)
    cos, sin = angle.cos(), angle.sin()
    caches = [
        torch.zeros(batch_size, kv_heads, capacity, width, device=size.device, dtype=BF16)
    ] * 2
    offset = capacity // 2

    def everything(rotated: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """The query and the new entries, for the check."""
        new = (cache[:, :, offset : offset + 1] for cache in (k_cache, v_cache))
        return torch.cat((rotated, *new), 1)

    ours, theirs = ([cache.clone() for cache in caches] for _ in range(2))
    given = (q, k, v, cos, sin)

    def plain(*tensors: Tensor) -> Tensor:
        return rotary_append_reference(*tensors, offset, interleaved=False)

    fused = compiled(size, plain)
    peers: dict[str, Call] = {"eager": lambda: everything(plain(*given, *theirs), *theirs)}
    if fused:
        peers["torch.compile"] = lambda: everything(fused(*given, *theirs), *theirs)
    return Case(
        "rotary_append, and reading it back",
        f"batch_size={batch_size} heads={heads}/{kv_heads} d={width}",
        BF16,
        lambda: everything(rotary_append(*given, *ours, offset, interleaved=False), *ours),
        lambda: everything(plain(*given, *theirs), *theirs),
        rotary_append_cost(q, k, v),
        peers,
    )


def _merging(size: Size) -> Iterator[Case]:
    batch_size, tokens, width = size.of(64, 2), size.of(197, 21), size.of(64, 16)
    metric = size.randn(batch_size, tokens, width)
    x, ones = size.randn(batch_size, tokens, size.of(768, 33)), torch.ones(batch_size, tokens)
    sizes = ones.to(size.device)
    order = torch.arange(tokens, dtype=torch.int32, device=size.device).expand(batch_size, -1)
    sources, targets = order[:, ::2].contiguous(), order[:, 1::2].contiguous()
    _, to = token_match_reference(metric, sources, targets)
    shape = f"batch_size={batch_size} tokens={tokens} width={width}"

    def match(metric: Tensor) -> Tensor:
        return token_match_reference(metric, sources, targets)[0]

    def energy(metric: Tensor) -> Tensor:
        return token_energy_reference(metric, margin=0.5)

    def merge(x: Tensor) -> Tensor:
        return merge_tokens_reference(x, sizes, targets, sources, to)[0]

    half = similarity_cost(metric)
    moved = 1.5 * x.numel() * x.element_size()
    rows = (
        ("token_match", match, metric, lambda: token_match(metric, sources, targets)[0], half),
        ("token_energy", energy, metric, lambda: token_energy(metric, margin=0.5), half),
        (
            "token_merge",
            merge,
            x,
            lambda: merge_tokens(x, sizes, targets, sources, to)[0],
            Cost(2.0 * x.numel(), moved, 1),
        ),
    )
    for name, plain, given, ours, cost in rows:
        yield Case(name, shape, BF16, ours, _bind(plain, given), cost, _both(size, plain, given))


def _bind(plain: Any, given: Tensor) -> Call:
    return lambda: plain(given)


def _both(size: Size, plain: Any, given: Tensor) -> dict[str, Call]:
    fused = compiled(size, plain)
    peers = {"eager": _bind(plain, given)}
    return {**peers, "torch.compile": _bind(fused, given)} if fused else peers
