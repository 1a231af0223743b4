"""Products with weights: dense, on some neurons, and with adapters; against cuBLAS and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_case import Call, Case, Size, compiled
from torch import Tensor
from torch.nn import functional

from codegen.triton_kernels.gated_activation import ACTIVATIONS
from codegen.triton_kernels.gathered_mlp import (
    gathered_down,
    gathered_down_reference,
    gathered_mlp_cost,
    gathered_up,
    gathered_up_reference,
)
from codegen.triton_kernels.gemv import gemv, gemv_cost, gemv_reference
from codegen.triton_kernels.lora import Adapters, lora, lora_cost, lora_reference, pack_adapters

__all__ = ["cases"]

BF16 = torch.bfloat16
SILU = ACTIVATIONS["silu"]


def cases(size: Size) -> Iterator[Case]:
    """All of them."""
    for rows in (1, 8, 16):
        for shape in ((4096, 4096), (14336, 4096), (4096, 14336)):
            out_features, in_features = (size.of(n, n % 97 + 3) for n in shape)
            yield _dense(size, rows, out_features, in_features)
            yield _int8(size, rows, out_features, in_features)
    for share in (2, 4):
        yield _gathered(size, share)
    yield _threshold(size)
    yield _lora(size)
    yield _shards(size)


def _dense(size: Size, rows: int, out_features: int, in_features: int) -> Case:
    x, weight = size.randn(rows, in_features), size.randn(out_features, in_features)
    fused = compiled(size, functional.linear)
    peers: dict[str, Call] = {"linear": lambda: functional.linear(x, weight)}
    if fused:
        peers["torch.compile"] = lambda: fused(x, weight)
    return Case(
        "gemv",
        f"rows={rows} weight={out_features}x{in_features} bfloat16",
        BF16,
        lambda: gemv(x, weight),
        lambda: gemv_reference(x, weight),
        gemv_cost(rows, weight),
        peers,
    )


def _int8(size: Size, rows: int, out_features: int, in_features: int) -> Case:
    x, scale = size.randn(rows, in_features), torch.rand(out_features, device=size.device)
    weight = torch.randint(
        -127, 128, (out_features, in_features), dtype=torch.int8, device=size.device
    )

    def plain(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return (functional.linear(x, weight.to(x.dtype)).float() * scale).to(x.dtype)

    fused = compiled(size, plain)
    return Case(
        "gemv int8",
        f"rows={rows} weight={out_features}x{in_features} int8",
        BF16,
        lambda: gemv(x, weight, scale),
        lambda: gemv_reference(x, weight, scale),
        gemv_cost(rows, weight),
        {"torch.compile": lambda: fused(x, weight, scale)} if fused else {},
    )


def _mlp(size: Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [1, hidden_size] and the weights, each [intermediate_size, hidden_size]."""
    hidden_size, intermediate_size = size.of(4096, 33), size.of(14336, 65)
    weights = (size.randn(intermediate_size, hidden_size) / hidden_size**0.5 for _ in range(3))
    gate, up, down = weights
    return size.randn(1, hidden_size), gate, up, down


def _dense_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (functional.silu(x @ gate.T) * (x @ up.T)) @ down


def _gathered(size: Size, share: int) -> Case:
    x, gate, up, down = _mlp(size)
    count = gate.shape[0] // share
    neurons = torch.randperm(gate.shape[0], device=size.device)[:count].int().unsqueeze(0)
    picked = neurons[0].long()

    def ours() -> Tensor:
        hidden = gathered_up(x, gate, up, neurons, activation=SILU)
        return gathered_down(hidden, down, neurons)

    def reference() -> Tensor:
        hidden = gathered_up_reference(x, gate, up, neurons, activation=SILU)
        return gathered_down_reference(hidden, down, neurons)

    small = [w[picked].contiguous() for w in (gate, up, down)]
    fused = compiled(size, _dense_mlp)
    peers: dict[str, Call] = {
        "index_select": lambda: _dense_mlp(
            x, *(w.index_select(0, picked) for w in (gate, up, down))
        ),
        "compact copy": lambda: _dense_mlp(x, *small),
    }
    if fused:
        peers["compact copy, torch.compile"] = lambda: fused(x, *small)
    cost = gathered_mlp_cost(1, count, x.shape[1], 2)
    return Case(
        "gathered_mlp", f"1/{share} of {len(gate)}x{x.shape[1]}", BF16, ours, reference, cost, peers
    )


def _threshold(size: Size) -> Case:
    x, gate, up, down = _mlp(size)
    gated = functional.silu(x @ gate.T)
    threshold = float(gated.abs().float().median())
    kept = torch.where(gated.abs() > threshold, gated, 0)

    def ours() -> Tensor:
        return gathered_down(gathered_up(x, gated, up, threshold=threshold), down)

    def dense() -> Tensor:
        return (kept * (x @ up.T)) @ down

    def reference() -> Tensor:
        hidden = gathered_up_reference(x, gated, up, threshold=threshold)
        return gathered_down_reference(hidden, down)

    cost = gathered_mlp_cost(1, gate.shape[0] // 3, x.shape[1], 2)  # half of two of three matrices
    shape = f"half of {gate.shape[0]} neurons, gate given"
    return Case("gathered_mlp threshold", shape, BF16, ours, reference, cost, {"dense": dense})


def _lora(size: Size) -> Case:
    rows, width, rank, count = size.of(32, 3), size.of(4096, 33), size.of(16, 4), size.of(8, 2)
    made = [
        (size.randn(rank, width) / width**0.5, size.randn(width, rank) / rank**0.5, 2.0)
        for _ in range(count)
    ]
    adapters = pack_adapters(made)
    ids = torch.randint(-1, count, (rows,), device=size.device).int()
    a = torch.stack([a for a, _, _ in made])
    b = torch.stack([b for _, b, _ in made])
    return _adapted(size, "lora", adapters, ids, (a, b))


def _shards(size: Size) -> Case:
    """Rank 16 from shards of a quarter of a row, as MoS keeps them."""
    rows, width, rank, count = size.of(32, 3), size.of(4096, 64), size.of(16, 4), size.of(8, 2)
    pool = size.randn(size.of(2048, 40), width // 4) / width**0.5
    other = size.randn(size.of(2048, 40), width // 4)
    tables = [
        torch.randint(0, len(pool), (count, rank, 4), device=size.device).int() for _ in range(2)
    ]
    scaling = torch.full((count,), 1.0, device=size.device)
    adapters = Adapters(pool, tables[0], other, tables[1], scaling)
    ids = torch.randint(-1, count, (rows,), device=size.device).int()
    a = pool[tables[0].long()].flatten(-2)
    b = other[tables[1].long()].flatten(-2).transpose(1, 2)
    return _adapted(size, "lora shards", adapters, ids, (a, b))


def _adapted(
    size: Size, name: str, adapters: Adapters, ids: Tensor, dense: tuple[Tensor, Tensor]
) -> Case:
    a, b = dense
    x, base = size.randn(len(ids), a.shape[2]), size.randn(len(ids), b.shape[1])

    def plain(x: Tensor, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
        chosen = ids.long().clamp(min=0)
        low = torch.einsum("mi,mri->mr", x, a[chosen])
        scale = torch.where(ids >= 0, adapters.scaling[chosen], 0.0)
        return (base + scale.unsqueeze(1) * torch.einsum("mr,mor->mo", low, b[chosen])).to(x.dtype)

    fused = compiled(size, plain)
    peers: dict[str, Call] = {"gather and einsum": lambda: plain(x, base, a, b)}
    if fused:
        peers["torch.compile"] = lambda: fused(x, base, a, b)
    return Case(
        name,
        f"rows={len(ids)} width={x.shape[1]} rank={a.shape[1]} adapters={len(a)}",
        BF16,
        lambda: lora(x, base, adapters, ids),
        lambda: lora_reference(x, base, adapters, ids),
        lora_cost(x, base, a.shape[1]),
        peers,
    )
