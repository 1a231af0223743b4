"""How a dialect operator is declared: schema, reference, fake kernel and cost in one place.

Every operator lives in the `torch.library` namespace `rewriter`, so it survives `torch.export` and
`torch.compile`; its reference is the plain PyTorch meaning and runs on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.cost.cost import Cost

__all__ = ["OPS", "DialectOp", "dialect_op", "nbytes"]

_LIBRARY = torch.library.Library("rewriter", "DEF")


@dataclass(frozen=True)
class DialectOp:
    """An operator of the dialect.

    Attributes:
        name: without the namespace.
        overload: what a graph node's `target` is.
        reference: plain PyTorch with the same arguments.
        cost: of one call, from (fake) arguments like those of the call.
        traceable: whether torch.compile can trace the reference without looking at values.
    """

    name: str
    overload: torch._ops.OpOverload
    reference: Callable[..., Any]
    cost: Callable[..., Cost]
    traceable: bool = True


OPS: dict[str, DialectOp] = {}
"""Every dialect operator by name."""


def dialect_op(
    signature: str,
    *,
    fake: Callable[..., Any],
    cost: Callable[..., Cost],
    traceable: bool = True,
) -> Callable[[Callable[..., Any]], DialectOp]:
    """Register the decorated reference as `rewriter::<signature>`.

    Args:
        signature: schema text, e.g. `"rms_norm(Tensor x, Tensor? weight, *, float eps) -> Tensor"`.
        fake: shapes and dtypes of the result, for tracing.
        cost: arithmetic and traffic of one call.
        traceable: False for a reference that looks at values, such as how often an expert is chosen.
    """

    def register(reference: Callable[..., Any]) -> DialectOp:
        name = signature.split("(", 1)[0]
        _LIBRARY.define(signature)
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"rewriter::{name}", fake, lib=_LIBRARY)
        overload = getattr(torch.ops.rewriter, name).default
        OPS[name] = DialectOp(name, overload, reference, cost, traceable)
        return OPS[name]

    return register


def nbytes(*tensors: Tensor | None) -> float:
    """Bytes of the tensors given, None counting nothing."""
    return float(sum(t.numel() * t.element_size() for t in tensors if t is not None))
