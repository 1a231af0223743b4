"""Sites and the ways to compute each, for benchmarks/alternatives.py.

A call reads weights or entries from a pool far larger than a core's caches, another place each time,
as a decode step does that goes through the layers of a model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from codegen.cpp_kernels.decode_attention import decode_attention
from codegen.cpp_kernels.gathered_mlp import gathered_mlp
from codegen.cpp_kernels.gemv import gemv
from codegen.kernel import KernelDescription
from rewriter.cost.cost import Cost
from rewriter.cost.work import Work, dtype_name, linear_work
from rewriter.dialect import OPS
from rewriter.dialect.int8 import Int8Matrix
from rewriter.dialect.linear import linear
from rewriter.engine.cached_attention import AttentionShape

__all__ = ["Case", "Pool", "Site", "sites"]

_LINEAR = (
    (256, 256), (512, 512), (768, 768), (1024, 1024), (2048, 768), (768, 2048), (1536, 1536),
    (2048, 2048), (576, 1536), (3072, 1024), (1024, 4096), (4096, 4096), (8192, 2048), (32000, 768),
)  # fmt: skip
"""Output and input sizes."""
_HEADS = ((4, 4, 64), (12, 12, 64), (8, 2, 64), (9, 3, 64), (16, 8, 128), (32, 8, 64), (32, 8, 128))
"""Heads, KV heads, and their width."""
_KV_LENS = (64, 256, 1024, 4096)
_BUDGETS = (64, 256, 1024)
_MLP = ((256, 1024), (768, 2048), (576, 1536), (1024, 4096), (2048, 5632), (1536, 8960))
"""Hidden and intermediate sizes."""
_DENSITIES = (2, 4, 8)
"""One of so many neurons is active."""
_ALLOWED = {torch.float32: 2e-3, torch.bfloat16: 3e-2}
"""Error relative to the largest output; sums run in another order, int8 rows are exact."""

Call = Callable[[int], Tensor]
"""Computes the site on the operands of a turn."""


@dataclass(frozen=True)
class Case:
    """One way: what it is to a cost model, how it runs, and what it should give at turn 0."""

    work: Work
    backend: str
    call: Call
    reference: Callable[[], Tensor]

    def error(self) -> str:
        """What is wrong with its result; "" where nothing is."""
        found, wanted = self.call(0).float(), self.reference().float()
        off = float((found - wanted).abs().max() / wanted.abs().max())
        allowed = _ALLOWED[getattr(torch, self.work.dtype)]
        return "" if off <= allowed else f"{self.work} on {self.backend}: off by {off:.1e}"


@dataclass(frozen=True)
class Site:
    """Cases that stand for each other."""

    name: str
    cases: tuple[Case, ...]


class Pool:
    """Numbers of each dtype; operands are views of it at a place that moves with the turn."""

    def __init__(self, mebibytes: int) -> None:
        random = torch.Generator().manual_seed(0)
        count = mebibytes * 2**18
        wide = torch.empty(count).normal_(generator=random).mul_(0.05)
        self.numbers = {torch.float32: wide, torch.bfloat16: wide.bfloat16()}
        self.numbers[torch.int8] = (wide * 400).clamp_(-127, 127).to(torch.int8)

    def at(self, turn: int, shape: tuple[int, ...], dtype: torch.dtype, number: int = 0) -> Tensor:
        """The `number`-th operand of a turn; 64 elements are a line of the cache or more."""
        numbers, size = self.numbers[dtype], torch.Size(shape).numel()
        places = max(1, len(numbers) // (-(-size // 64) * 64))
        first = (turn * 3 + number) % places * (-(-size // 64) * 64)
        return numbers[first : first + size].view(shape)


def sites(pool: Pool) -> Iterator[Site]:
    """All of them."""
    for dtype in (torch.float32, torch.bfloat16):
        for (out_size, in_size), rows in product(_LINEAR, (1, 4)):
            yield _linear(pool, rows, out_size, in_size, dtype)
        for heads, batch_size in product(_HEADS, (1, 4)):
            yield _attention(pool, AttentionShape(*heads, heads[2], dtype), batch_size)
        for hidden_size, intermediate_size in _MLP:
            yield _mlp(pool, hidden_size, intermediate_size, dtype)


def _linear(pool: Pool, rows: int, out_size: int, in_size: int, dtype: torch.dtype) -> Site:
    x, scale = torch.randn(rows, in_size).to(dtype), torch.full((out_size,), 0.01)
    shape = (out_size, in_size)

    def narrow(turn: int) -> Int8Matrix:
        return Int8Matrix(pool.at(turn, shape, torch.int8), scale)

    @functools.cache
    def plain() -> Tensor:
        return functional.linear(x.float(), pool.at(0, shape, dtype).float())

    @functools.cache
    def scaled() -> Tensor:
        return functional.linear(x.float(), narrow(0).weight.float()) * scale

    wide = linear_work(rows, out_size, in_size, dtype_name(dtype), dtype_name(dtype))
    int8 = linear_work(rows, out_size, in_size, dtype_name(dtype), "int8")
    cases = (
        Case(wide, "eager", lambda turn: linear(x, pool.at(turn, shape, dtype)), plain),
        Case(wide, "cpu", lambda turn: gemv(x, pool.at(turn, shape, dtype)), plain),
        Case(int8, "eager", lambda turn: linear(x, narrow(turn)), scaled),
        Case(int8, "cpu", lambda turn: gemv(x, *narrow(turn)), scaled),
    )
    return Site(f"linear {dtype_name(dtype)} {out_size}x{in_size} rows={rows}", cases)


def _attention(pool: Pool, shape: AttentionShape, batch_size: int) -> Site:
    lengths = [n for n in _KV_LENS if n * batch_size <= max(_KV_LENS)]
    cases = [c for kv_len in lengths for c in _dense(pool, shape, batch_size, kv_len)]
    cases += [c for budget in _BUDGETS for c in _bounded(pool, shape, batch_size, budget)]
    heads = f"{shape.num_heads}/{shape.num_kv_heads}x{shape.head_dim}"
    return Site(f"attention {dtype_name(shape.dtype)} {heads} batch={batch_size}", tuple(cases))


def _dense(pool: Pool, shape: AttentionShape, batch_size: int, kv_len: int) -> Iterator[Case]:
    """Heads repeated, heads grouped, and the kernel that both are in C++."""
    dtype, scale = shape.dtype, shape.head_dim**-0.5
    q = torch.randn(batch_size, shape.num_heads, 1, shape.head_dim).to(dtype)
    extents = (batch_size, shape.num_kv_heads, kv_len, shape.head_dim)
    told = _described(shape)

    def entries(turn: int) -> tuple[Tensor, Tensor]:
        return pool.at(turn, extents, dtype), pool.at(turn, extents, dtype, 1)

    @functools.cache
    def reference() -> Tensor:
        k, v = (t.float() for t in entries(0))
        return OPS["attention"].reference(q.float(), k, v, softmax_scale=scale, mask="causal")

    def run(op: str) -> Call:
        compute = OPS[op].reference
        return lambda turn: compute(q, *entries(turn), softmax_scale=scale, mask="causal")

    def native(turn: int) -> Tensor:
        return decode_attention(told, q, *entries(turn), softmax_scale=scale)[0]

    for op in ("attention", "grouped_attention"):
        if op == "attention" or shape.group_size > 1:
            work = shape.decode_work(op, kv_len, batch_size)
            yield Case(work, "eager", run(op), reference)
            yield Case(work, "cpu", native, reference)


def _bounded(pool: Pool, shape: AttentionShape, batch_size: int, budget: int) -> Iterator[Case]:
    """`budget` slots whose keys are turned as they are read."""
    dtype, scale, half = shape.dtype, shape.head_dim**-0.5, shape.head_dim // 2
    q = torch.randn(batch_size, shape.num_heads, 1, shape.head_dim).to(dtype)
    k, v = torch.randn(2, batch_size, shape.num_kv_heads, 1, shape.head_dim).to(dtype)
    extents = (batch_size, shape.num_kv_heads, budget + 1, shape.head_dim)
    angles = torch.rand(batch_size, 1, budget + 2, half)
    cos, sin = angles.cos(), angles.sin()
    slots = torch.full((batch_size, 1), budget - 1)
    distance = torch.arange(budget).flip(0).expand(batch_size, 1, budget)
    mask = torch.zeros(batch_size, 1, 1, budget)
    told = _described(shape, terms=("bias",), form="rotary")
    options = {"softmax_scale": scale, "num_sink_tokens": 4}

    def rings(turn: int) -> tuple[Tensor, Tensor]:
        return pool.at(turn, extents, dtype), pool.at(turn, extents, dtype, 1)

    def eager(turn: int) -> Tensor:
        ring = rings(turn)
        return OPS["streaming_attention"].reference(
            q, k, v, *ring, slots, distance, mask, cos, sin, **options
        )

    def native(turn: int) -> Tensor:
        k_ring, v_ring = rings(turn)
        k_ring[:, :, budget - 1], v_ring[:, :, budget - 1] = k[:, :, 0], v[:, :, 0]
        own = (table[:, :, budget : budget + 1] for table in (cos, sin))
        query = OPS["rope"].reference(q, *own, interleaved=False)
        tables = cos[:, 0, :budget], sin[:, 0, :budget]
        kept = k_ring[:, :, :budget], v_ring[:, :, :budget]
        return decode_attention(told, query, *kept, softmax_scale=scale, bias=mask, rotary=tables)[
            0
        ]

    def reference() -> Tensor:
        ring = [t.float() for t in rings(0)]
        return OPS["streaming_attention"].reference(
            *(t.float() for t in (q, k, v)), *ring, slots, distance, mask, cos, sin, **options
        )

    work = shape.decode_work("streaming_attention", budget, batch_size)
    yield Case(work, "eager", eager, reference)
    yield Case(work, "cpu", native, reference)


def _mlp(pool: Pool, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> Site:
    """The whole block, and the block over few neurons in an order of chance."""
    x = torch.randn(1, hidden_size).to(dtype)
    inner, outer = (intermediate_size, hidden_size), (hidden_size, intermediate_size)
    random = torch.Generator().manual_seed(0)
    neurons = torch.randperm(intermediate_size, generator=random)

    def weights(turn: int) -> tuple[Tensor, Tensor, Tensor]:
        first, second = (pool.at(turn, inner, dtype, n) for n in (0, 1))
        return first, second, pool.at(turn, outer, dtype, 2)

    def eager(turn: int) -> Tensor:
        return OPS["gated_mlp"].reference(x, *weights(turn), activation="silu")

    def native(turn: int) -> Tensor:
        gate, up, down = weights(turn)
        return gemv(functional.silu(gemv(x, gate)) * gemv(x, up), down)

    @functools.cache
    def dense() -> Tensor:
        wide = [w.float() for w in weights(0)]
        return OPS["gated_mlp"].reference(x.float(), *wide, activation="silu")

    def gathered(kept: Tensor) -> Case:
        def few(turn: int) -> Tensor:
            gate, up, _ = weights(turn)
            down = pool.at(turn, inner, dtype, 2)
            return gathered_mlp(x, gate, up, down, kept, activation="silu")

        def reference() -> Tensor:
            gate, up, _ = (w.float() for w in weights(0))
            down = pool.at(0, inner, dtype, 2).float()
            hidden = functional.silu(x.float() @ gate[kept].T) * (x.float() @ up[kept].T)
            return hidden @ down[kept]

        work = _mlp_work("gathered_mlp", hidden_size, len(kept), dtype, launches=1)
        return Case(work, "cpu", few, reference)

    work = _mlp_work("gated_mlp", hidden_size, intermediate_size, dtype, launches=3)
    few = (gathered(neurons[: intermediate_size // share].clone()) for share in _DENSITIES)
    cases = (Case(work, "eager", eager, dense), Case(work, "cpu", native, dense), *few)
    return Site(f"mlp {dtype_name(dtype)} {hidden_size}x{intermediate_size}", cases)


def _mlp_work(operator: str, hidden: int, neurons: int, dtype: torch.dtype, launches: int) -> Work:
    moved = 3 * hidden * neurons * dtype.itemsize + 2 * hidden * dtype.itemsize
    sizes = {"rows": 1, "in_size": hidden, "out_size": hidden, "intermediate_size": neurons}
    cost = Cost(6.0 * hidden * neurons, float(moved), launches)
    return Work(operator, cost, sizes, dtype_name(dtype), dtype_name(dtype))


def _described(
    shape: AttentionShape, terms: tuple[str, ...] = (), form: str = ""
) -> KernelDescription:
    return KernelDescription(
        operator="decode_attention",
        dtype=shape.dtype,
        head_dim=shape.head_dim,
        group_size=shape.group_size,
        mask="full",
        terms=terms,
        form=form,
    )
