"""Inputs a program is tried on, and what the original makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.capture.guards import demand
from rewriter.decoding.derive import logits_index
from rewriter.decoding.state import Session
from rewriter.program import Program

__all__ = ["FlatScenario", "Runner", "Scenario", "TokenScenario", "device_of"]

Runner = Callable[..., Any]
"""Runs the placeholders of a program in order, in the place of its own module."""


@dataclass(frozen=True)
class FlatScenario:
    """One call of a plain module on flat inputs by placeholder name."""

    name: str
    inputs: Mapping[str, Tensor]

    def reference(self, original: Program) -> tuple[Tensor, ...]:
        """What the original returns. Raises InputError for sizes that it was not traced for."""
        demand(original.meta.get("guards", ()), self.inputs)
        return tuple(original(**self.inputs))

    def candidate(self, program: Program, run: Runner | None = None) -> tuple[Tensor, ...]:
        """What another program returns for the same inputs."""
        if run is None:
            return tuple(program(**self.inputs))
        return tuple(run(*[self.inputs[node.name] for node in program.placeholders()]))


@dataclass(frozen=True)
class TokenScenario:
    """A batch of sequences, fed to a session in calls of given sizes, left padded where not `keep`.

    Attributes:
        ids: int64 [batch_size, length]. keep: bool of the same shape. calls: tokens of each call.
    """

    name: str
    ids: Tensor
    keep: Tensor
    calls: tuple[int, ...]

    def reference(self, original: Program) -> tuple[Tensor, ...]:
        """Logits of all real tokens [tokens, vocab_size]: padded rows alone and without padding."""
        if bool(self.keep.all()):
            return (_whole(original, self.ids).flatten(0, 1),)
        pairs = zip(self.ids, self.keep, strict=True)
        rows = [_whole(original, ids[keep].unsqueeze(0))[0] for ids, keep in pairs]
        return (torch.cat(rows),)

    def candidate(self, program: Program, run: Runner | None = None) -> tuple[Tensor, ...]:
        """Logits of the decoding program at the same tokens, in the same order."""
        session = Session(program, self.ids.shape[0], run=run)
        padded = not bool(self.keep.all())
        logits, start = [], 0
        for size in self.calls:
            part = slice(start, start + size)
            mask = self.keep[:, part] if padded else None
            logits.append(session.run(self.ids[:, part], attention_mask=mask))
            start += size
        return (torch.cat(logits, dim=1)[self.keep],)


Scenario = FlatScenario | TokenScenario


def _whole(original: Program, ids: Tensor) -> Tensor:
    """Logits [batch_size, length, vocab_size] of unpadded sequences in one call."""
    if original.decoding is not None:
        return Session(original, ids.shape[0]).run(ids)
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
    return original(input_ids=ids, position_ids=positions)[logits_index(original)]


def device_of(program: Program) -> torch.device:
    """Where the program's weights are; the CPU when it has none."""
    parameter = next(program.module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
