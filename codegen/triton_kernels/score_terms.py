"""What joins an attention's scores besides its mask: a bias, ALiBi slopes, and sinks.

    scores = softcap(q kᵀ · softmax_scale) + bias + slope · (j - i)

A sink is one more score, which has no value. A bias broadcasts to [batch_size, num_heads, q_len, entries],
entries being numbered as in storage; of bool it says what is visible (`seen`). Sinks and slopes are
[num_heads]. Sources:
https://arxiv.org/abs/2108.12409 (ALiBi), https://arxiv.org/abs/2309.17453 (sinks)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.kernel import KernelDescription
from codegen.triton_kernels.generate import pointer
from rewriter.errors import InputError

__all__ = [
    "TERMS",
    "join_sink",
    "term_arguments",
    "term_constants",
    "term_refusal",
    "term_signature",
    "with_terms",
]

TERMS = ("bias", "seen", "sinks", "slopes")
"""In this order in a description, which has one of the first two at most."""


@triton.jit
def with_terms(
    scores: tl.tensor,
    distance: tl.tensor,
    slope: tl.tensor,
    bias: tl.tensor,
    live: tl.tensor,
    BIAS: tl.constexpr,
    SLOPED: tl.constexpr,
) -> tl.tensor:
    """Scores [M, N] with a bias, whose addresses [M, N] may be read where live, and ALiBi.

    distance [M, N] is j - i; slope broadcasts to it.
    """
    if BIAS == "bias":
        scores += tl.load(bias, mask=live, other=0.0).to(tl.float32)
    elif BIAS == "seen":
        scores = tl.where(tl.load(bias, mask=live, other=0) != 0, scores, float("-inf"))
    if SLOPED:
        scores += slope * distance.to(tl.float32)
    return scores


@triton.jit
def join_sink(
    acc: tl.tensor, peak: tl.tensor, total: tl.tensor, sink: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Sums [M, V], peak and total [M] after one more score that has no value; in powers of two."""
    new_peak = tl.maximum(peak, sink)
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # -inf - -inf would be NaN
    shrink = tl.exp2(peak - base)
    return acc * shrink[:, None], new_peak, total * shrink + tl.exp2(sink - base)


def term_refusal(description: KernelDescription, allowed: tuple[str, ...]) -> str | None:
    """Why a kernel does not take the terms that are described, or None."""
    terms = description.terms
    ordered = tuple(name for name in allowed if name in terms)
    if terms == ordered and not {"bias", "seen"} <= set(terms):
        return None
    return f"terms={terms}, allowed: {' then '.join(allowed) or 'none'}, one kind of bias"


def term_signature(description: KernelDescription) -> dict[str, str]:
    """Types of the parameters in a signature. Compiled ahead of time, a bias has the queries' dtype."""
    bias = torch.bool if "seen" in description.terms else description.dtype
    strides = [f"bias_{of}" for of in ("batch", "head", "row", "entry")]
    return {
        "bias": pointer(bias, 0),
        **dict.fromkeys(("sinks", "slopes"), pointer(torch.float32)),
        **dict.fromkeys(strides, "i64"),
    }


def term_constants(description: KernelDescription) -> dict[str, Any]:
    """The constants that the kernels choose by."""
    kinds = [name for name in description.terms if name in ("bias", "seen")]
    return {
        "BIAS": kinds[0] if kinds else "",
        "SINKS": "sinks" in description.terms,
        "SLOPED": "slopes" in description.terms,
    }


def term_arguments(
    description: KernelDescription,
    q: Tensor,
    kv_len: int,
    bias: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> tuple[list[Tensor], list[int]]:
    """Tensors `bias, sinks, slopes` and the strides of the bias; q stands in for what is not read.

    Raises:
        InputError: terms that are not those described, or of other shapes.
    """
    kind = "seen" if bias is not None and bias.dtype == torch.bool else "bias"
    given = {kind: bias, "sinks": sinks, "slopes": slopes}
    names = tuple(name for name in TERMS if given.get(name) is not None)
    if names != description.terms:
        raise InputError(f"terms {names} are given, allowed: {description.terms}, as described")
    for name, tensor in (("sinks", sinks), ("slopes", slopes)):
        if tensor is not None and tuple(tensor.shape) != (q.shape[1],):
            raise InputError(f"{name}: shape {tuple(tensor.shape)}, allowed: ({q.shape[1]},)")
    strides = [0] * 4
    if bias is not None:
        whole = (*q.shape[:3], kv_len)
        try:
            strides = list(bias.expand(whole).stride())
        except RuntimeError as error:
            told = f"bias: shape {tuple(bias.shape)}"
            raise InputError(f"{told}, allowed: what broadcasts to {whole}") from error
    each = [q if t is None else t.float().contiguous() for t in (sinks, slopes)]
    return [q if bias is None else bias, *each], strides
