"""Distances between two computations of the same thing."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.errors import RewriterError

__all__ = ["CANNOT_RUN", "logit_metrics", "relative_error", "relative_l2"]

CANNOT_RUN = (
    RewriterError,
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)
"""What running a wrong program raises; running out of memory and interrupts are not its fault."""


def relative_error(candidate: Tensor, reference: Tensor) -> float:
    """Largest |candidate - reference| over the largest |reference|; infinite for NaN or other shapes."""
    if candidate.shape != reference.shape:
        return float("inf")
    if not candidate.is_floating_point():
        return 0.0 if torch.equal(candidate, reference) else float("inf")
    a, b = candidate.double(), reference.double()
    same = (a == b) | (a.isnan() & b.isnan())
    distance = torch.where(same, torch.zeros((), dtype=torch.float64), (a - b).abs())
    if distance.numel() == 0:
        return 0.0
    worst = distance.max().item()
    finite = b[b.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 1.0
    if worst == 0.0:
        return 0.0
    return worst / max(scale, 1e-30) if worst == worst else float("inf")


def relative_l2(candidate: Tensor, reference: Tensor) -> float:
    """‖candidate - reference‖ / ‖reference‖."""
    a, b = candidate.double(), reference.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def logit_metrics(candidate: Tensor, reference: Tensor) -> dict[str, float]:
    """KL divergence in nats and agreement of the most likely token; logits [..., vocab_size]."""
    p = torch.log_softmax(reference.double(), dim=-1)
    q = torch.log_softmax(candidate.double(), dim=-1)
    kl = (p.exp() * (p - q)).sum(-1).flatten().clamp_min(0)
    agree = (candidate.argmax(-1) == reference.argmax(-1)).double().mean()
    return {
        "kl_mean": kl.mean().item(),
        "kl_p99": torch.quantile(kl, 0.99).item(),
        "top1_agreement": agree.item(),
        "max_abs": (candidate.double() - reference.double()).abs().max().item(),
    }
