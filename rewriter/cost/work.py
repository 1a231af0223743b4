"""What is computed at a site, told without saying how fast: what a cost model is asked about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from rewriter.cost.cost import Cost

__all__ = ["SIZES", "Work", "dtype_name", "linear_work", "total"]

SIZES = (
    *("rows", "in_size", "out_size", "intermediate_size"),
    *("batch_size", "q_len", "kv_len", "num_heads", "num_kv_heads", "head_dim"),
)
"""Names of the sizes that a time may depend on. `rows`: vectors that a matrix is multiplied with."""


@dataclass(frozen=True)
class Work:
    """One call of an operator.

    Attributes:
        operator: of the dialect, e.g. `linear` or `grouped_attention`; "" where none describes it.
        cost: arithmetic, traffic and launches of the call.
        sizes: by names of `SIZES`.
        dtype: of activations, e.g. `float32`. weight_dtype: of weights or cached entries.
    """

    operator: str
    cost: Cost
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    dtype: str = "float32"
    weight_dtype: str = "float32"


def dtype_name(dtype: torch.dtype) -> str:
    """As `Work` has it, e.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def linear_work(rows: int, out_size: int, in_size: int, dtype: str, weight_dtype: str) -> Work:
    """`linear` of `rows` vectors; int8 weights have an fp32 scale for each output row."""
    width, weight_width = (_BYTES[name] for name in (dtype, weight_dtype))
    scales = 4 * out_size if weight_dtype == "int8" else 0
    moved = weight_width * out_size * in_size + scales + width * rows * (in_size + out_size)
    sizes = {"rows": rows, "out_size": out_size, "in_size": in_size}
    cost = Cost(2.0 * rows * out_size * in_size, float(moved), 1)
    return Work("linear", cost, sizes, dtype, weight_dtype)


def total(works: Iterable[Work]) -> Cost:
    """The cost of all."""
    return sum((work.cost for work in works), Cost())


_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
