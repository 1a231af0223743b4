"""Runs a program's placeholders through the compiled entries of an artifact."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.errors import ArtifactError
from rewriter.export.pt2_archive import Pt2File
from rewriter.export.pt2_entry import (
    DECODE,
    PREFILL,
    Limits,
    has_entry_positions,
    state_buffer,
    state_shape,
)
from rewriter.program import Program

__all__ = ["CompiledEntry", "ModuleRun", "TokenRun"]


class CompiledEntry:
    """One entry of an artifact in memory: constants are handed to it once and never copied."""

    def __init__(self, file: Pt2File, name: str, constants: Mapping[str, Tensor]) -> None:
        self.name = name
        try:
            self._loader = torch._C._aoti.AOTIModelPackageLoader(str(file.path), name, False, 1, -1)
        except RuntimeError as error:
            told = str(error).strip().splitlines() or [""]
            raise ArtifactError(f"{file.path}: {name} cannot be loaded: {told[0]}") from error
        self._wanted = frozenset(self._loader.get_constant_fqns())
        missing = sorted(self._wanted - constants.keys())
        if missing:
            raise ArtifactError(f"{file.path} has no constant {missing[0]!r}, which {name} needs")
        own = {fqn: constants[fqn] for fqn in self._wanted}
        self._loader.load_constants(own, False, True, True)

    def bind(self, constants: Mapping[str, Tensor]) -> None:
        """Put other tensors in the place of some constants."""
        own = {fqn: tensor for fqn, tensor in constants.items() if fqn in self._wanted}
        if own:
            self._loader.load_constants(own, False, False, True)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Its outputs."""
        return self._loader.boxed_run(list(inputs))


class ModuleRun:
    """A program without decoding through its one entry."""

    def __init__(self, program: Program, entry: CompiledEntry) -> None:
        self._entry = entry
        self._dtypes = [spec.dtype for spec in program.signature.inputs]

    def __call__(self, *args: Tensor) -> list[Tensor]:
        """As the program's graph; compiled code takes other dtypes and layouts for granted."""
        given = zip(args, self._dtypes, strict=True)
        return self._entry(*[value.to(dtype).contiguous() for value, dtype in given])


class TokenRun:
    """A program that decodes, for the batch and capacity its entries were compiled for.

    Args:
        entries: by name. limits: what they were compiled for.
        fallback: runs the placeholders for every other batch or capacity.
    """

    def __init__(
        self,
        program: Program,
        entries: Mapping[str, CompiledEntry],
        limits: Limits,
        fallback: Callable[..., Any],
    ) -> None:
        assert program.decoding is not None
        self.program, self.limits, self.fallback = program, limits, fallback
        self._prefill, self._decode = entries[PREFILL], entries[DECODE]
        self.names = [node.name for node in program.placeholders()]
        specs = program.decoding.states
        self.shapes = {spec.name: state_shape(spec, limits) for spec in specs}
        self._grows = has_entry_positions(program.decoding)
        self._counting = torch.arange(max(limits.max_length, 1))
        self._bound: tuple[Tensor, ...] = ()
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Sequence[Tensor]:
        """As the program's graph; the states that are given are mutated."""
        values = dict(zip(self.names, args, strict=True))
        ids: Tensor = values["input_ids"]
        states = tuple(values[name] for name in self.shapes)
        if ids.shape[0] != self.limits.batch or not self._fit(states):
            return self.fallback(*args)
        inputs = [ids.contiguous(), self._positions(values, ids).contiguous()]
        if self._grows:
            inputs.append(self._entry_positions(values, ids).contiguous())
        with self._lock:
            self._bind(states)
            if ids.shape[1] == 1:
                return self._decode(*inputs)
            return self._prefill(*inputs, self._rows(values, ids.shape[1]))

    def _fit(self, states: Sequence[Tensor]) -> bool:
        pairs = zip(states, self.shapes.values(), strict=True)
        return all(state.shape == shape and state.is_contiguous() for state, shape in pairs)

    def _bind(self, states: tuple[Tensor, ...]) -> None:
        """Let the entries mutate these states: another session may have run in between."""
        if len(self._bound) == len(states) and all(map(_same, states, self._bound)):
            return
        tensors = dict(zip(map(state_buffer, self.shapes), states, strict=True))
        for entry in (self._prefill, self._decode):
            entry.bind(tensors)
        self._bound = states

    def _positions(self, values: Mapping[str, Any], ids: Tensor) -> Tensor:
        """True positions of the new tokens, -1 = padding."""
        for name in ("q_positions", "position_ids"):
            if values.get(name) is not None:
                return values[name]
        start = values.get("kv_offset") or 0
        return torch.arange(start, start + ids.shape[1]).expand(ids.shape)

    def _entry_positions(self, values: Mapping[str, Any], ids: Tensor) -> Tensor:
        """Of every entry, those of this call among them."""
        given = values.get("k_positions")
        if given is not None:
            return given
        total = values["kv_offset"] + ids.shape[1]
        return self._counting[:total].expand(ids.shape[0], -1)

    def _rows(self, values: Mapping[str, Any], q_len: int) -> Tensor:
        keep = values.get("logits_to_keep") or q_len
        return torch.arange(max(q_len - keep, 0), q_len)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b
