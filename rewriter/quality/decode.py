"""Greedy decoding on sessions that can be forked, several rows in lockstep."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rewriter.decoding.state import Session

__all__ = ["continue_greedily", "feed"]


def feed(session: Session, rows: list[list[int]]) -> Tensor:
    """New tokens for each row, left padded where their numbers differ.

    Returns:
        logits after the last token of each row [rows, vocab_size].
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[row[0]] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    padded = None if bool(mask.all()) else mask
    return session.run(ids, attention_mask=padded, logits_to_keep=1)[:, -1]


def continue_greedily(
    session: Session, logits: Tensor, limit: int, is_end: Callable[[int], bool] = lambda _: False
) -> list[list[int]]:
    """The most likely token again and again, for each row until its end token or the limit.

    Args:
        session: after the prompt. logits: [rows, vocab_size] after its last token.
    """
    replies: list[list[int]] = [[] for _ in range(len(logits))]
    going = set(range(len(logits)))
    for step in range(limit):
        tokens = logits.argmax(-1)
        for row in sorted(going):
            replies[row].append(int(tokens[row]))
            if is_end(replies[row][-1]):
                going.discard(row)
        if not going or step + 1 == limit:
            break
        logits = session.run(tokens.unsqueeze(1), logits_to_keep=1)[:, -1]
    return replies
