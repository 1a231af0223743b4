"""Inputs a program is tried on, and what the original makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.decoding.derive import logits_index
from rewriter.decoding.mixing import probe_tokens
from rewriter.decoding.state import Session
from rewriter.errors import VerificationError
from rewriter.program import InputSpec, Program
from rewriter.verify.verification import Verification

__all__ = ["FlatScenario", "Scenario", "TokenScenario", "make_scenarios"]

Runner = Callable[..., Any]


@dataclass(frozen=True)
class TokenScenario:
    """A batch of sequences, fed in calls of given sizes, left padded where the mask is False.

    Attributes:
        ids: int64 [batch_size, length]. keep: bool of the same shape. calls: tokens of each call.
    """

    name: str
    ids: Tensor
    keep: Tensor
    calls: tuple[int, ...]

    def reference(self, original: Program) -> tuple[Tensor, ...]:
        """Logits of the full-sequence program, each row alone and without padding."""
        index, rows = logits_index(original), []
        for ids, keep in zip(self.ids, self.keep, strict=True):
            real = ids[keep].unsqueeze(0)
            positions = torch.arange(real.shape[1]).unsqueeze(0)
            rows.append(original(input_ids=real, position_ids=positions)[index][0])
        return (torch.cat(rows),)

    def candidate(self, program: Program, run: Runner | None = None) -> tuple[Tensor, ...]:
        """Logits of the decoding program at the same tokens, in the same order."""
        if program.decoding is None:
            return self.reference(program)
        session = Session(program, self.ids.shape[0], run=run)
        padded = not bool(self.keep.all())
        logits, start = [], 0
        for size in self.calls:
            part = slice(start, start + size)
            mask = self.keep[:, part] if padded else None
            logits.append(session.run(self.ids[:, part], attention_mask=mask))
            start += size
        return (torch.cat(logits, dim=1)[self.keep],)


@dataclass(frozen=True)
class FlatScenario:
    """One call of a plain module on flat inputs by placeholder name."""

    name: str
    inputs: Mapping[str, Tensor]

    def reference(self, original: Program) -> tuple[Tensor, ...]:
        """What the original returns."""
        return tuple(original(**self.inputs))

    def candidate(self, program: Program, run: Runner | None = None) -> tuple[Tensor, ...]:
        """What another program returns for the same inputs."""
        if run is None:
            return tuple(program(**self.inputs))
        return tuple(run(*[self.inputs[node.name] for node in program.placeholders()]))


Scenario = TokenScenario | FlatScenario


def make_scenarios(original: Program, verification: Verification) -> list[Scenario]:
    """Prefill, chunks with single tokens, and padded rows for causal LMs; other sizes for the rest."""
    if original.meta.get("kind") == "causal_lm":
        return list(_token_scenarios(original, verification))
    return list(_flat_scenarios(original, verification))


def _token_scenarios(original: Program, verification: Verification) -> list[TokenScenario]:
    length = verification.length
    limit = original.meta.get("max_positions")
    if limit is not None and limit < length:
        length = int(limit)
    steps = min(verification.decode_steps, length // 2)
    seed, prompt = verification.seed, length - steps
    ones = (1,) * steps
    half = prompt // 2
    single = probe_tokens(original, 1, length, seed)
    pair = probe_tokens(original, 2, length, seed + 1)
    ragged = probe_tokens(original, 3, length, seed + 2)
    starts = torch.tensor([0, 2, min(5, prompt - 1)])
    keep = torch.arange(length) >= starts[:, None]
    return [
        TokenScenario(f"prefill 1x{length}", single, torch.ones_like(single).bool(), (length,)),
        TokenScenario(
            f"chunks and decode 2x{half}+1+{prompt - half - 1}+{steps}",
            pair,
            torch.ones_like(pair).bool(),
            (half, 1, prompt - half - 1, *ones),
        ),
        TokenScenario(f"left-padded decode 3x{prompt}+{steps}", ragged, keep, (prompt, *ones)),
    ]


def _flat_scenarios(original: Program, verification: Verification) -> list[FlatScenario]:
    names = sorted({d for spec in original.signature.inputs for d in spec.dims if isinstance(d, str)})
    sizes: list[dict[str, int]] = [{n: 2 if n == "batch" else 11 for n in names}]
    if names:
        sizes.append({n: 3 if n == "batch" else 7 for n in names})
        sizes.append({n: 1 if n == "batch" else 16 for n in names})
    return [_flat(original, size, verification.seed + i) for i, size in enumerate(sizes)]


def _flat(original: Program, sizes: dict[str, int], seed: int) -> FlatScenario:
    generator = torch.Generator().manual_seed(seed)
    inputs = {s.name: _random(original, s, sizes, generator) for s in original.signature.inputs}
    label = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
    return FlatScenario(label, inputs)


def _random(
    original: Program, spec: InputSpec, sizes: dict[str, int], generator: torch.Generator
) -> Tensor:
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims]
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(spec.dtype)
    if spec.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    if spec.dtype.is_complex:
        raise VerificationError(f"input {spec.name} is complex; give verify=False")
    return torch.randint(0, _rows(original, spec.name), shape, generator=generator, dtype=spec.dtype)


def _rows(original: Program, name: str) -> int:
    """Rows of the smallest table an integer input indexes; 2 when it indexes none (a mask)."""
    node = original.placeholder(name)
    rows = [
        call.args[0].meta["val"].shape[0]  # pyright: ignore
        for call in original.calls(torch.ops.aten.embedding.default)
        if call.args[1] is node
    ]
    return int(min(rows)) if rows else 2
