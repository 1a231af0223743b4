"""How much of the original's attention falls on what a variant kept, beside the best choice.

The oracle keeps, for each query by itself, the entries with the most attention, as many as the variant
has: no method at that budget can hold more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.decoding.state import Session
from rewriter.dialect import OPS
from rewriter.program import Program
from rewriter.quality.fidelity import Trace

__all__ = ["RetainedMass", "first_token_mass", "retained_mass"]


@dataclass(frozen=True)
class RetainedMass:
    """Shares of the attention mass in [0, 1], means over layers, heads and late queries."""

    variant: float
    oracle: float


class _Probabilities(fx.Interpreter):
    """Runs a program and hands every attention's probabilities to `visit(layer, [rows, heads, q, kv])`.

    An attention whose values are the unit matrix returns its probabilities, whatever mask, bias,
    soft-cap or sinks it has.
    """

    ATTENTIONS = frozenset(OPS[name].overload for name in ("attention", "grouped_attention"))

    def __init__(self, program: Program, visit: Any) -> None:
        super().__init__(program.module)
        self._visit, self._layer = visit, 0

    def __call__(self, *inputs: Any) -> Any:
        with torch.no_grad():
            return self.run(*inputs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in self.ATTENTIONS:
            q, k, v, *rest = args
            unit = torch.eye(k.shape[2], dtype=v.dtype, device=v.device)
            unit = unit.expand(*v.shape[:2], -1, -1)
            self._visit(self._layer, target(q, k, unit, *rest, **kwargs).float())
            self._layer += 1
        return super().call_function(target, args, kwargs)


def retained_mass(program: Program, ids: Tensor, traces: Sequence[Trace]) -> list[RetainedMass]:
    """For each trace, the attention mass on its kept entries and on the oracle's.

    Args:
        program: the original's, with decoding. ids: int64 [rows, length] that the traces were made of.
            Only queries at which the variant had lost something count; without any, both are 1.
    """
    sums = torch.zeros(len(traces), 3, dtype=torch.float64)
    for row in range(len(ids)):

        def visit(layer: int, probabilities: Tensor, row: int = row) -> None:
            ordered = probabilities[0].sort(dim=-1, descending=True).values.cumsum(-1)
            for index, trace in enumerate(traces):
                if layer in trace.kept:
                    sums[index] += _masses(probabilities[0], ordered, trace.kept[layer][row])

        Session(program, 1, run=_Probabilities(program, visit)).run(ids[row : row + 1])
    return [
        RetainedMass(1.0, 1.0) if count == 0 else RetainedMass(mine / count, best / count)
        for mine, best, count in sums.tolist()
    ]


def first_token_mass(program: Program, ids: Tensor, *, skip: int = 16) -> list[list[float]]:
    """Share of the attention on the first token, by layer and head.

    Args:
        ids: int64 [rows, length]. skip: first queries that do not count.
    """
    found: list[Tensor] = []
    Session(program, len(ids), run=_Probabilities(program, lambda _, p: found.append(p))).run(ids)
    return [p[:, :, skip:, 0].mean((0, 2)).tolist() for p in found]


def _masses(probabilities: Tensor, ordered: Tensor, kept: Tensor) -> Tensor:
    """Sums over late queries of the kept and of the best mass, and their number.

    probabilities, ordered (cumulated from the largest): [heads, q, kv]; kept: bool [q, kv].
    """
    counts = kept.sum(-1)
    late = counts < torch.arange(1, len(kept) + 1)
    mine = (probabilities * kept).sum(-1)[:, late]
    index = (counts - 1).clamp_min(0).view(1, -1, 1).expand(len(ordered), -1, 1)
    best = ordered.gather(-1, index)[:, late, 0]
    return torch.tensor([mine.sum(), best.sum(), mine.numel()], dtype=torch.float64)
