"""Make the scenarios of a program: random, seeded, and no larger than they need to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from rewriter.decoding.mixing import probe_tokens
from rewriter.errors import VerificationError
from rewriter.program import Dim, InputSpec, Program
from rewriter.verify.scenarios import FlatScenario, Scenario, TokenScenario, device_of
from rewriter.verify.verification import Verification

__all__ = ["decoding_scenarios", "whole_scenarios"]

WHOLE_SIZES = ((2, 7), (1, 1), (2, 2))
"""Batch size and length of calls on whole token sequences, besides the longest: odd, and the least."""
MODULE_SIZES = ({"batch": 3, "seq": 7}, {"batch": 1, "seq": 16})
"""Extents of a plain module's dynamic dimensions, besides those it was traced with."""
OTHER_EXTENT = 11


def decoding_scenarios(original: Program, verification: Verification) -> list[Scenario]:
    """Prefill, chunks and single tokens, and a left-padded batch of a causal LM, in sessions."""
    batch_size, length = _token_extents(original, verification.length)
    steps = min(verification.decode_steps, length // 2)
    prompt, seed = length - steps, verification.seed
    ones = (1,) * steps
    single = _tokens(original, batch_size or 1, length, seed)
    pair = _tokens(original, batch_size or 2, length, seed + 1)
    calls = tuple(size for size in _chunks(prompt) if size) + ones
    shape = "+".join(str(size) for size in (*_chunks(prompt), steps))
    scenarios: list[Scenario] = [
        TokenScenario(f"prefill {_sizes(single)}", single, _all(single), (length,)),
        TokenScenario(f"chunks and steps {len(pair)}x{shape}", pair, _all(pair), calls),
    ]
    if batch_size is None and _is_dynamic(original, -1) and prompt > 1:
        ragged = _tokens(original, 3, length, seed + 2)
        starts = torch.tensor([0, min(2, prompt - 1), min(5, prompt - 1)], device=ragged.device)
        keep = torch.arange(length, device=ragged.device) >= starts[:, None]
        name = f"left-padded batch 3x{prompt}+{steps}"
        scenarios.append(TokenScenario(name, ragged, keep, (prompt, *ones)))
    return scenarios


def whole_scenarios(original: Program, verification: Verification) -> list[Scenario]:
    """Single calls at several lengths and batch sizes."""
    if original.meta.get("kind") == "causal_lm":
        return list(_whole_tokens(original, verification))
    return list(_module_inputs(original, verification.seed))


def _chunks(prompt: int) -> tuple[int, ...]:
    """One token, two, and the rest in two halves."""
    first, second = min(1, prompt), min(2, max(prompt - 1, 0))
    rest = prompt - first - second
    return first, second, rest // 2, rest - rest // 2


def _all(ids: Tensor) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool)


def _sizes(ids: Tensor) -> str:
    return "x".join(str(extent) for extent in ids.shape)


def _tokens(original: Program, batch_size: int, length: int, seed: int) -> Tensor:
    return probe_tokens(original, batch_size, length, seed).to(device_of(original))


def _is_dynamic(original: Program, dim: int) -> bool:
    return isinstance(_token_dims(original)[dim], str)


def _token_dims(original: Program) -> tuple[Dim, ...]:
    dims = (spec.dims for spec in original.signature.inputs if spec.name == "input_ids")
    return next(dims, ("batch", "seq"))


def _token_extents(original: Program, length: int) -> tuple[int | None, int]:
    """The batch size that capture fixed, or None, and a length that the model accepts."""
    batch_size, fixed = (d if isinstance(d, int) else None for d in _token_dims(original))
    if fixed is not None:
        return batch_size, fixed
    limit = original.meta.get("max_positions")
    return batch_size, length if limit is None else min(length, int(limit))


def _whole_tokens(original: Program, verification: Verification) -> Iterator[FlatScenario]:
    batch_size, longest = _token_extents(original, verification.length)
    sizes = [(1, longest), *WHOLE_SIZES] if _is_dynamic(original, -1) else [(1, longest)]
    for i, (rows, length) in enumerate(sizes):
        if length > longest:
            continue
        ids = _tokens(original, batch_size or rows, length, verification.seed + i)
        positions = torch.arange(length, device=ids.device).expand(ids.shape[0], -1).contiguous()
        yield FlatScenario(f"sequence {_sizes(ids)}", {"input_ids": ids, "position_ids": positions})


def _module_inputs(original: Program, seed: int) -> Iterator[FlatScenario]:
    dims = {d for spec in original.signature.inputs for d in spec.dims if isinstance(d, str)}
    traced = _traced_extents(original)
    yield _module_call(original, traced, seed, masked=False)
    for i, sizes in enumerate(MODULE_SIZES if dims else (traced,)):
        yield _module_call(original, sizes, seed + 1 + i, masked=True)


def _traced_extents(original: Program) -> dict[str, int]:
    """The extents of the example that was traced, by the name of the dimension."""
    extents: dict[str, int] = {}
    for spec in original.signature.inputs:
        node = original.placeholder(spec.name)
        shape = getattr(node.meta.get("val"), "shape", ()) if node is not None else ()
        for dim, size in zip(spec.dims, shape, strict=False):
            hint = size.node.hint if isinstance(size, torch.SymInt) else size
            if isinstance(dim, str) and isinstance(hint, int):
                extents[dim] = hint
    return extents


def _module_call(
    original: Program, sizes: Mapping[str, int], seed: int, *, masked: bool
) -> FlatScenario:
    generator = torch.Generator().manual_seed(seed)
    device = device_of(original)
    inputs = {
        spec.name: _random(original, spec, sizes, generator, masked).to(device)
        for spec in original.signature.inputs
    }
    shown = ", ".join(f"{name} {_sizes(value) or 'number'}" for name, value in inputs.items())
    return FlatScenario(shown, inputs)


def _random(
    original: Program,
    spec: InputSpec,
    sizes: Mapping[str, int],
    generator: torch.Generator,
    masked: bool,
) -> Tensor:
    """Values that the input can take; what indexes no table is a mask, all ones unless `masked`."""
    shape = [sizes.get(dim, OTHER_EXTENT) if isinstance(dim, str) else dim for dim in spec.dims]
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(spec.dtype)
    if spec.dtype.is_complex:
        raise VerificationError(f"input {spec.name} is complex; give verify=False")
    rows = None if spec.dtype == torch.bool else _table_rows(original, spec.name)
    if rows is not None:
        return torch.randint(0, rows, shape, generator=generator, dtype=spec.dtype)
    mask = torch.ones(shape, dtype=spec.dtype)
    if masked and mask.dim() > 1:
        mask[..., 1:] = torch.randint(0, 2, mask[..., 1:].shape, generator=generator)
    return mask


def _table_rows(original: Program, name: str) -> int | None:
    """Rows of the smallest table an integer input indexes; None when it indexes none."""
    node = original.placeholder(name)
    rows = [
        int(call.args[0].meta["val"].shape[0])  # pyright: ignore
        for call in original.calls(torch.ops.aten.embedding.default)
        if call.args[1] is node
    ]
    return min(rows, default=None)
