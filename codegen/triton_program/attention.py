"""Attention of a program: few new tokens run `decode_attention`, prompts `prefill_attention`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from codegen.kernel import KernelDescription
from codegen.triton_kernels.decode_attention import decode_attention
from codegen.triton_kernels.prefill_attention import prefill_attention
from codegen.triton_program.ledger import Site

__all__ = ["FEW_TOKENS", "attention_site"]

FEW_TOKENS = 16
"""New tokens of a row up to which `decode_attention` runs, which is one tile of one head."""


def attention_site(
    site: Site,
    arguments: dict[str, Any],
    description: KernelDescription,
    reference: Callable[..., Tensor],
) -> Callable[..., Tensor]:
    """`attention` or `grouped_attention`.

    Args:
        description: of its `prefill_attention`.
        reference: what the operator means, for calls that no kernel takes.
    """
    scale = arguments["softmax_scale"]
    settings = {name: arguments[name] for name in ("softmax_scale", "mask", "span", "softcap")}

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_positions: Tensor | None,
        k_positions: Tensor | None,
        bias: Tensor | None,
        sinks: Tensor | None,
        slopes: Tensor | None,
    ) -> Tensor:
        few, placed = q.shape[2] <= FEW_TOKENS, q_positions is not None or k_positions is not None
        reason = _why_not(q, k, v, few, placed, slopes is not None)
        if reason is not None:
            site.passed(reason)
            terms = (q_positions, k_positions, bias, sinks, slopes)
            return reference(q, k, v, *terms, **settings)
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        extra: dict[str, Any] = {"bias": bias, "sinks": sinks, "slopes": slopes}
        if not few:
            site.ran("prefill_attention")
            start = 0 if description.mask == "full" and slopes is None else None
            given = {"softmax_scale": scale, "q_start": start, **extra}
            return prefill_attention(description, q, k, v, **given)[0]
        site.ran("decode_attention")
        layout = "bhsd" if k_positions is None else "slots"
        described = replace(description, operator="decode_attention", layout=layout)
        if k_positions is not None:
            k_positions = k_positions.expand(q.shape[0], -1)
        if q_positions is not None:
            q_positions = q_positions.expand(q.shape[0], -1)
        elif description.mask == "full" and slopes is None:  # anywhere: all is seen from everywhere
            q_positions = torch.zeros(q.shape[0::2], dtype=torch.int64, device=q.device)
        given = {"k_positions": k_positions, "softmax_scale": scale, **extra}
        return decode_attention(described, q, k, v, q_positions, **given)[0]

    return run


def _why_not(q: Tensor, k: Tensor, v: Tensor, few: bool, placed: bool, sloped: bool) -> str | None:
    if not q.dtype == k.dtype == v.dtype:
        return "attention over entries of another dtype"
    if sloped and not placed and q.shape[2] > k.shape[2]:
        return "slopes of queries before the first entry"
    if placed and not few:
        return f"attention of more than {FEW_TOKENS} new tokens with padding"
    return None
