"""Whether a candidate's logits are the original's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Agreement", "agreement"]

MAX_ERROR = {"float32": 1e-3, "bfloat16": 3e-1, "int8": 6e-1}
"""Largest |logits - reference| over the largest |reference|. Wrong rotations make it 1.2."""
MAX_DIVERGENCE = {"float32": 1e-6, "bfloat16": 1e-2, "int8": 7e-2}
"""Mean Kullback-Leibler divergence in nats. Wrong rotations make it 0.14. Rounding to bfloat16, as Hugging
Face does it, costs 2e-4 (110m) and 2e-3 (1b), int8 weights up to 2e-3 and 2e-2."""


@dataclass(frozen=True)
class Agreement:
    """How near two sets of logits are.

    Attributes:
        error: largest difference over the reference's largest magnitude.
        divergence: mean over the rows of KL(reference || candidate), in nats.
        same_tokens: rows whose largest logit is at the same token.
        rows: how many.
    """

    error: float
    divergence: float
    same_tokens: int
    rows: int

    def objection(self, dtype: str) -> str:
        """Why this is not the same model, or ""."""
        if not self.error <= MAX_ERROR[dtype]:
            return f"logits differ by {self.error:.1e} of the largest"
        if not self.divergence <= MAX_DIVERGENCE[dtype]:
            return f"divergence is {self.divergence:.1e} nats"
        if dtype == "float32" and self.same_tokens < self.rows:
            return f"{self.rows - self.same_tokens} of {self.rows} greedy tokens differ"
        return ""


def agreement(logits: np.ndarray, reference: np.ndarray) -> Agreement:
    """Both [rows, vocab_size]."""
    if logits.shape != reference.shape:
        raise ValueError(f"logits are {logits.shape}, those of the reference {reference.shape}")
    expected, given = _log_softmax(reference), _log_softmax(logits)
    divergence = (np.exp(expected) * (expected - given)).sum(axis=-1)
    return Agreement(
        error=float(np.abs(logits - reference).max() / np.abs(reference).max()),
        divergence=max(0.0, float(divergence.mean())),
        same_tokens=int((logits.argmax(axis=-1) == reference.argmax(axis=-1)).sum()),
        rows=len(logits),
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
