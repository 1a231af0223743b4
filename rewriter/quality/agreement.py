"""Free-running agreement: how long a variant writes the very text that the original writes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rewriter.optimized import OptimizedModel
from rewriter.quality.decode import continue_greedily

__all__ = ["common_prefixes", "greedy_continuations"]


def greedy_continuations(model: OptimizedModel, prompts: Tensor, limit: int) -> list[list[int]]:
    """`limit` tokens after each prompt, int64 [rows, length]; no end token stops them."""
    session = model.session(len(prompts))
    return continue_greedily(session, session.run(prompts, logits_to_keep=1)[:, -1], limit)


def common_prefixes(
    originals: Sequence[Sequence[int]], others: Sequence[Sequence[int]]
) -> list[int]:
    """Number of equal tokens from the beginning, for each row."""
    return [
        next(
            (i for i, pair in enumerate(zip(*rows, strict=True)) if len(set(pair)) > 1),
            len(rows[0]),
        )
        for rows in zip(originals, others, strict=True)
    ]
