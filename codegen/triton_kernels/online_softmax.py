"""Softmax over tiles that arrive one after another, in powers of two.

Scores are multiplied by log2(e) beforehand, because the hardware has exp2 and not exp. A row keeps
its greatest score so far, the sum of its weights relative to that, and its weighted values:

    peak' = max(peak, max(s));  w = exp2(s - peak');  total' = total exp2(peak - peak') + sum(w)

A row that has seen nothing has peak -inf and total 0; it ends as zeros with an lse of -inf.
Source: https://arxiv.org/abs/1805.02867
"""

from __future__ import annotations

import triton
import triton.language as tl

from codegen.triton_kernels.activations import tanh

__all__ = ["LN_2", "LOG2_E", "capped", "finish", "fold_in"]

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def capped(scores: tl.tensor, SOFTCAP: tl.constexpr) -> tl.tensor:
    """softcap · tanh(scores / softcap); the scores themselves where softcap is 0."""
    if SOFTCAP != 0.0:
        scores = tanh(scores / SOFTCAP) * SOFTCAP
    return scores


@triton.jit
def fold_in(
    scores: tl.tensor, peak: tl.tensor, total: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Take a tile of scores [M, N] into peak and total [M].

    Returns:
        weights [M, N] relative to the new peak, the factor [M] by which what was accumulated so far
        shrinks, the new peak and the new total [M].
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # -inf - -inf would be NaN
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    return weights, shrink, new_peak, total * shrink + tl.sum(weights, 1)


@triton.jit
def finish(acc: tl.tensor, peak: tl.tensor, total: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The output [M, V] and its natural-log lse [M]; zeros and -inf where nothing was seen."""
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    lse = tl.where(seen, (peak + tl.log2(total)) * LN_2, float("-inf"))
    return acc / total[:, None], lse
