"""Inputs of attention kernels, with NaN wherever nothing may be read, and mutations of their text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from codegen.kernel import Kernel, KernelDescription
from codegen.triton_kernels import generate

__all__ = ["DEVICE", "Cached", "cached", "each_device", "mutated", "poisoned", "queries"]

_INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if _INTERPRETED else "cuda"
"""Where tests run that are not there for each device."""
_NO_GPU = "no CUDA device, or interpreted: set TRITON_INTERPRET=0"

each_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(not _INTERPRETED, reason="not interpreted")),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(_INTERPRETED or not torch.cuda.is_available(), reason=_NO_GPU),
            ],
        ),
    ],
)
"""The same test in the interpreter and on a GPU."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Tensors that a launcher allocates without filling them are NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).new_empty(5).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def mutated(old: str, new: str) -> Iterator[None]:
    """Kernels run from their generated text with `old` replaced, wherever it is in the text.

    What a wrong kernel computes may overflow: the interpreter does not warn of it.
    """
    described, met = generate.described, []

    def change(kernel: Kernel, description: KernelDescription, config: Any = None) -> str:
        text = described(kernel, description, config)
        met.append(old in text)
        return text.replace(old, new)

    generate.described = change  # type: ignore[assignment]
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        generate.described = described
    assert any(met), f"no kernel has {old!r}"


@dataclass
class Cached:
    """A cache in one layout, as launchers take it."""

    k: Tensor
    v: Tensor
    kv_lens: Tensor
    k_positions: Tensor | None = None
    block_table: Tensor | None = None

    @property
    def index(self) -> Tensor:
        """What the layout calls so; anything for `bhsd`."""
        found = self.k_positions if self.k_positions is not None else self.block_table
        return self.kv_lens if found is None else found


def queries(
    description: KernelDescription, batch_size: int, num_kv_heads: int, kv_lens: Tensor, q_len: int
) -> tuple[Tensor, Tensor]:
    """q bhsd and positions: the last q_len of each request, -1 before its start.

    Before and after q there are infinities, which a product with nothing (0 · inf) would report.
    """
    num_heads = num_kv_heads * description.group_size
    room = torch.full((batch_size + 2, num_heads, q_len, description.head_dim), torch.inf)
    room[1:-1] = torch.randn(room[1:-1].shape)
    q = room.to(description.dtype).to(kv_lens.device)[1:-1]
    positions = kv_lens.unsqueeze(1) - q_len + torch.arange(q_len, device=kv_lens.device)
    return q, positions.clamp_min(-1)


def cached(
    description: KernelDescription, kv_lens: list[int], num_kv_heads: int, device: str
) -> Cached:
    """Random entries; what is beyond them, in empty slots and in unused pages is NaN."""
    width = description.value_dim or description.head_dim
    make = _LAYOUTS[description.layout]
    lens = torch.tensor(kv_lens)
    found = make(description, lens, num_kv_heads, width)
    moved = [None if t is None else t.to(device) for t in vars(found).values()]
    k, v = (t.to(description.dtype) for t in moved[:2] if t is not None)
    return Cached(k, v, *moved[2:])  # type: ignore[arg-type]


def _bhsd(d: KernelDescription, lens: Tensor, num_kv_heads: int, width: int) -> Cached:
    """Rows of [batch_size, capacity, num_kv_heads, d], so that strides are unusual."""
    capacity = max(int(lens.max()), 1)
    beyond = (torch.arange(capacity) >= lens.unsqueeze(1))[:, None, :, None]
    k, v = (
        torch.randn(len(lens), capacity, num_kv_heads, n)
        .transpose(1, 2)
        .masked_fill(beyond, torch.nan)
        for n in (d.head_dim, width)
    )
    return Cached(k, v, lens)


def _slots(d: KernelDescription, lens: Tensor, num_kv_heads: int, width: int) -> Cached:
    """Every KV head has its own order and its own empty slots, a quarter of all."""
    capacity = max(int(lens.max()), 1)
    shape = (len(lens), num_kv_heads, capacity)
    positions = torch.rand(shape).argsort(-1)
    positions[(torch.rand(shape) < 0.25) | (positions >= lens.view(-1, 1, 1))] = -1
    empty = (positions < 0).unsqueeze(-1)
    k, v = (torch.randn(*shape, n).masked_fill(empty, torch.nan) for n in (d.head_dim, width))
    return Cached(k, v, torch.full_like(lens, capacity), k_positions=positions)


def _paged(d: KernelDescription, lens: Tensor, num_kv_heads: int, width: int) -> Cached:
    """Pages in random order, some of them nobody's."""
    pages = max(-(-int(lens.max()) // d.page_size), 1)
    table = torch.randperm(len(lens) * pages + 2)[: len(lens) * pages].view(len(lens), pages)
    shape = (len(lens) * pages + 2, num_kv_heads, d.page_size)
    used = torch.zeros(shape[0], d.page_size, dtype=torch.bool)
    used[table] = (torch.arange(pages * d.page_size) < lens.unsqueeze(1)).view(len(lens), pages, -1)
    hidden = ~used[:, None, :, None]
    k, v = (torch.randn(*shape, n).masked_fill(hidden, torch.nan) for n in (d.head_dim, width))
    return Cached(k, v, lens, block_table=table)


_LAYOUTS: dict[str, Callable[[KernelDescription, Tensor, int, int], Cached]] = {
    "bhsd": _bhsd,
    "slots": _slots,
    "paged": _paged,
}
