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
        reason = _why_not(q, k, v, few, placed)
        if reason is not None:
            site.passed(reason)
            terms = (q_positions, k_positions, bias, sinks, slopes)
            return reference(q, k, v, *terms, **settings)
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        if not few:
            site.ran("prefill_attention")
            start = 0 if description.mask == "full" else None
            return prefill_attention(description, q, k, v, softmax_scale=scale, q_start=start)[0]
        site.ran("decode_attention")
        layout = "bhsd" if k_positions is None else "slots"
        described = replace(description, operator="decode_attention", layout=layout)
        if k_positions is not None:
            k_positions = k_positions.expand(q.shape[0], -1)
        q_positions = _positions(description, q, q_positions)
        given = {"k_positions": k_positions, "softmax_scale": scale}
        return decode_attention(described, q, k, v, q_positions, **given)[0]

    return run


def _why_not(q: Tensor, k: Tensor, v: Tensor, few: bool, placed: bool) -> str | None:
    if not q.dtype == k.dtype == v.dtype:
        return "attention over entries of another dtype"
    if placed and not few:
        return f"attention of more than {FEW_TOKENS} new tokens with padding"
    return None


def _positions(
    description: KernelDescription, q: Tensor, q_positions: Tensor | None
) -> Tensor | None:
    """Where the queries stand; anywhere, where everything is seen from everywhere."""
    batch_size, q_len = q.shape[0], q.shape[2]
    if q_positions is not None:
        return q_positions.expand(batch_size, q_len)
    if description.mask == "full":
        return torch.zeros((batch_size, q_len), dtype=torch.int64, device=q.device)
    return None
