"""How far variants are from the original on the same tokens, one token at a time.

All models read the same rows in lockstep, so that no logits have to be kept. A bounded cache has then
forgotten what it would have forgotten in use: the streaming protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewriter.decoding.state import Session
from rewriter.optimized import OptimizedModel

__all__ = ["Trace", "compare"]

NEVER = -1
"""Distance where nothing was evicted yet."""


@dataclass
class Trace:
    """What one variant did on the rows of a source; every tensor is [rows, length].

    Attributes:
        kl: KL(original || variant) in nats at each position, fp64. agrees: whether the most likely
            token is the original's. nll: of the row's next token; one column less.
        evicted_ago: tokens since the state last lost an entry, `NEVER` before the first loss.
        kept: by layer that forgets: bool [rows, query position, position].
        state_bytes: of one row, at the end.
    """

    kl: Tensor
    agrees: Tensor
    nll: Tensor
    evicted_ago: Tensor
    kept: dict[int, Tensor]
    state_bytes: int


@dataclass
class _Reader:
    """One model's way through the rows."""

    session: Session
    kl: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)
    nll: list[Tensor] = field(default_factory=list)
    kept: dict[int, list[Tensor]] = field(default_factory=dict)

    def read(self, ids: Tensor, length: int) -> Tensor:
        """Log-probabilities [rows, vocab_size] after one more token of each row."""
        logits = self.session.run(ids, logits_to_keep=1)[:, 0]
        for layer, positions in self.session.kept_positions().items():
            self.kept.setdefault(layer, []).append(_as_mask(positions, length))
        return torch.log_softmax(logits.double(), dim=-1)

    def judge(self, mine: Tensor, original: Tensor, following: Tensor | None) -> None:
        self.kl.append((original.exp() * (original - mine)).sum(-1).clamp_min(0))
        self.agrees.append(mine.argmax(-1) == original.argmax(-1))
        if following is not None:
            self.nll.append(-mine.gather(-1, following.unsqueeze(-1))[:, 0])

    def trace(self) -> Trace:
        kept = {layer: torch.stack(masks, dim=1) for layer, masks in self.kept.items()}
        return Trace(
            torch.stack(self.kl, dim=1),
            torch.stack(self.agrees, dim=1),
            torch.stack(self.nll, dim=1),
            _evicted_ago(kept, len(self.kl), self.session.batch_size),
            kept,
            self.session.state_bytes() // self.session.batch_size,
        )


def compare(
    original: OptimizedModel,
    variants: Sequence[OptimizedModel],
    ids: Tensor,
    on_progress: Callable[[float], None] | None = None,
) -> list[Trace]:
    """Feed rows of tokens to all models.

    Args:
        ids: int64 [rows, length]. on_progress: called with the share that is done.

    Returns:
        the original's own trace, then one for each variant.
    """
    rows, length = ids.shape
    readers = [_Reader(model.session(rows)) for model in (original, *variants)]
    for step in range(length):
        column = ids[:, step : step + 1]
        following = ids[:, step + 1] if step + 1 < length else None
        reference, *others = (reader.read(column, length) for reader in readers)
        for reader, mine in zip(readers, (reference, *others), strict=True):
            reader.judge(mine, reference, following)
        if on_progress is not None:
            on_progress((step + 1) / length)
    return [reader.trace() for reader in readers]


def _as_mask(positions: Tensor, length: int) -> Tensor:
    """bool [rows, length]: which positions are among int64 [rows, ..., slots]."""
    flat = positions.flatten(1)
    mask = torch.zeros((len(flat), length + 1), dtype=torch.bool)
    mask.scatter_(1, torch.where(flat < 0, length, flat), True)
    return mask[:, :length]


def _evicted_ago(kept: Mapping[int, Tensor], length: int, rows: int) -> Tensor:
    """Tokens since an entry was lost in any layer, at each position."""
    ago = torch.full((rows, length), NEVER)
    for mask in kept.values():
        lost = torch.arange(1, length + 1) - mask.sum(-1)
        for step in range(1, length):
            fresh = lost[:, step] > lost[:, step - 1]
            before = ago[:, step - 1]
            since = torch.where(before < 0, before, before + 1)
            own = torch.where(fresh, 0, since)
            mixed = torch.where(ago[:, step] < 0, own, torch.minimum(ago[:, step], own))
            ago[:, step] = torch.where(own < 0, ago[:, step], mixed)
    return ago
