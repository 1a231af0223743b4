"""Sample what is added to attention scores: run the sub-graph at several lengths.

Short lengths are sampled whole. Longer ones, chosen past every integer literal of the sub-graph (a
window of 4096 looks causal below), are sampled at positions around those literals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from rewriter.program import Program
from rewriter.raising.evaluate import (
    attribute,
    concrete_shape,
    depends_on,
    free_symbols,
    needed,
    random_value,
)
from rewriter.raising.insertion import shape_of
from rewriter.raising.position_tables import POSITIONS
from rewriter.raising.sampled_values import SampledValues

__all__ = ["MASKED", "Lengths", "Role", "Sample", "Sampler", "Term", "Unclear"]

Role = Literal["add", "keep", "hide", "gate"]

MASKED = -1e4
"""An additive term at or below this hides an entry: models write -1e4, -65504 or finfo.min."""

_WHOLE = (1, 3, 8, 33)
_LONGER = 129
_LARGEST_LITERAL = 1 << 21
_MOST_LITERALS = 12
_BATCH = 2
_FEW_CHANGES = 4


@dataclass(frozen=True)
class Term:
    """An operand of the scores other than the product of queries and keys.

    Attributes:
        node: its tensor.
        role: "add": added, times `factor`; "keep": bool, False hides; "hide": bool, True hides;
            "gate": multiplied, 0 hides.
        shape: extents, symbolic ones as expressions, of the scores that it broadcasts to.
    """

    node: fx.Node
    role: Role
    shape: tuple[Any, ...]
    factor: float = 1.0


@dataclass(frozen=True)
class Sample:
    """A term at one length, for the positions in rows and columns.

    Attributes:
        keep: bool [heads or 1, rows, columns]: what the term leaves visible.
        added: the same shape: what it adds to visible entries; None for nothing.
    """

    rows: Tensor
    columns: Tensor
    keep: Tensor
    added: Tensor | None


@dataclass(frozen=True)
class Lengths:
    """Which values of the sequence symbols to try, and where to look."""

    sizes: dict[str, int]
    q_len: int
    kv_len: int
    literals: tuple[int, ...]

    def positions(self, length: int) -> Tensor:
        """All positions of a short sequence, those around the literals of a long one."""
        if length <= max(_WHOLE):
            return torch.arange(length)
        near = {c * k + d for c in self.literals for k in (1, 2) for d in range(-3, 4)}
        spread = range(0, length, max(length // 16, 1))
        wanted = {*near, *range(5), *range(length - 4, length), *spread}
        return torch.tensor(sorted(p for p in wanted if 0 <= p < length))


class Unclear(Exception):
    """A term that is no mask of positions: it differs between batch rows, or is not 0 or 1."""


class Sampler:
    """Samples terms of one program; what it evaluates is shared by layers."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.depends: dict[fx.Node, frozenset[str]] = {}
        self.symbols = sorted({s for node in program.placeholders() for s in free_symbols(node)})
        positions = program.placeholder(POSITIONS)
        self.counted = () if positions is None else shape_of(positions)[-1:]
        self.values: dict[Any, SampledValues] = {}
        self.indices: dict[Any, Tensor] = {}
        self.spelled: list[int] = []

    def content(self, term: Term) -> frozenset[str]:
        """Names of the inputs other than positions whose values the term depends on."""
        return depends_on(term.node, self.depends) - {POSITIONS}

    def learned(self, term: Term) -> bool:
        """Whether the term reads a parameter: it is a bias then, whatever its values are now."""
        tables = [n for n in needed([term.node], {}) if n.op == "get_attr"]
        return any(isinstance(attribute(self.program, n), torch.nn.Parameter) for n in tables)

    def literals(self, terms: Iterable[Term]) -> tuple[int, ...]:
        """Integers that the sub-graphs of the terms spell out, and what their tables say."""
        found: set[int] = set()
        for node in needed([term.node for term in terms], {}):
            if node.op == "get_attr":
                found |= _table_literals(attribute(self.program, node))
            else:
                found |= _integers((node.args, node.kwargs))
        self.spelled = sorted({*self.spelled, *(c for c in found if c <= _LARGEST_LITERAL)})
        usable = sorted(c for c in found if 2 < c <= _LARGEST_LITERAL)
        return tuple(usable[-_MOST_LITERALS:])

    def limit(self, term: Term) -> int:
        """The longest sequence for which the term has to have a value: tables of the model end."""
        tables = [n for n in needed([term.node], {}) if n.op == "get_attr"]
        sizes = [max(attribute(self.program, n).shape, default=0) for n in tables]
        limits = [self.program.meta.get("max_positions"), *(s for s in sizes if s > max(_WHOLE))]
        return min((limit for limit in limits if limit), default=_LARGEST_LITERAL * 4)

    def lengths(self, shape: Sequence[Any], literals: Sequence[int]) -> list[Lengths]:
        """Every length to try for scores of a shape; a single one when that is fixed."""
        q_extent, kv_extent = shape[-2:]
        dynamic = bool(_symbols_of((q_extent, kv_extent)))
        beyond = (c + 2 for c in literals if c > max(_WHOLE))
        tried = {*_WHOLE, _LONGER, *beyond, 2 * max(literals, default=1) + 3}
        out = []
        for length in sorted(tried) if dynamic else [_BATCH]:
            sizes = self.sizes(shape[-2:], length)
            q_len, kv_len = extent_value(q_extent, sizes), extent_value(kv_extent, sizes)
            out.append(Lengths(sizes, q_len, kv_len, tuple(literals)))
        return out

    def sizes(self, extents: Sequence[Any], length: int) -> dict[str, int]:
        """Sizes at which every extent, and the positions, reach `length`; a batch of 2."""
        own, value = _symbols_of((*extents, *self.counted)), length
        while True:
            sizes = {s: value if s in own else _BATCH for s in self.symbols}
            free = [extent for extent in extents if not isinstance(extent, int)]
            if all(extent_value(extent, sizes) >= length for extent in free):
                return sizes
            value += max(value // 8, 1)  # extents such as (s - 1) // 4 + 1, after a convolution

    def sample(self, term: Term, lengths: Lengths, num_heads: int, seed: int = 0) -> Sample:
        """The term at one length.

        Raises:
            Unclear: it differs between the rows of a batch, or a gate is neither 0 nor 1.
            UnsupportedSample, RuntimeError, IndexError: it cannot be evaluated at this length.
        """
        rows = self._positions(lengths, lengths.q_len)
        columns = self._positions(lengths, lengths.kv_len)
        raw = self._raw(term, lengths, rows, columns, seed)
        value = _per_head(raw, term, lengths, num_heads, len(rows), len(columns))
        if term.role == "gate" and not bool(((value == 0) | (value == 1)).all()):
            raise Unclear
        if term.role in ("keep", "gate", "hide"):
            return Sample(rows, columns, (value != 0) ^ (term.role == "hide"), None)
        if value.dtype == torch.bool:
            raise Unclear
        value = value.double() * term.factor
        keep = value > MASKED
        added = torch.where(keep, value, 0.0)
        return Sample(rows, columns, keep, added if bool((added != 0).any()) else None)

    def _positions(self, lengths: Lengths, length: int) -> Tensor:
        key = (length, lengths.literals)
        if key not in self.indices:
            self.indices[key] = lengths.positions(length)
        return self.indices[key]

    def _raw(
        self, term: Term, lengths: Lengths, rows: Tensor, columns: Tensor, seed: int
    ) -> Tensor:
        values = self._values(lengths, seed)
        shape = concrete_shape(term.node, lengths.sizes)
        whole = tuple(self._positions_of_dim(extent) for extent in shape)
        row = rows if len(shape) > 1 and shape[-2] != 1 else whole[-2] if len(shape) > 1 else None
        column = columns if shape and shape[-1] != 1 else whole[-1] if shape else None
        last = tuple(i for i in (row, column) if i is not None)
        return values.at(term.node, (*whole[: max(len(shape) - 2, 0)], *last))

    def _positions_of_dim(self, extent: int) -> Tensor:
        return self.indices.setdefault(("dim", extent), torch.arange(extent))

    def _values(self, lengths: Lengths, seed: int) -> SampledValues:
        key = (tuple(sorted(lengths.sizes.items())), seed)
        if key not in self.values:
            bindings = {n: self._input(n, lengths.sizes, seed) for n in self.program.placeholders()}
            self.values[key] = SampledValues(self.program, bindings, lengths.sizes)
        return self.values[key]

    def _input(self, node: fx.Node, sizes: dict[str, int], seed: int) -> Tensor:
        """Positions count up; other inputs are ones, zeros, and then random."""
        shape, value = concrete_shape(node, sizes), node.meta["val"]
        if node.name == POSITIONS:
            return torch.arange(shape[-1], device=value.device).expand(shape)
        if seed < 2:
            return torch.full(shape, 1 - seed, dtype=value.dtype, device=value.device)
        generator = torch.Generator().manual_seed(seed)
        random = random_value(node, sizes, generator)
        if value.dtype == torch.int64 and self.spelled:  # such as the token that stands for padding
            choices = torch.tensor(self.spelled)[
                torch.randint(len(self.spelled), shape, generator=generator)
            ]
            random = torch.where(torch.rand(shape, generator=generator) < 0.3, choices, random)
        return random.to(value.device)


def extent_value(extent: Any, sizes: dict[str, int]) -> int:
    """An integer, or an expression of symbols, at these sizes."""
    if isinstance(extent, int):
        return extent
    return int(extent.subs({symbol: sizes[str(symbol)] for symbol in extent.free_symbols}))


def _symbols_of(extents: Iterable[Any]) -> set[str]:
    return {str(symbol) for e in extents if not isinstance(e, int) for symbol in e.free_symbols}


def _table_literals(table: Tensor) -> set[int]:
    """Numbers of a tiny constant; of a square table its end and where its rows change."""
    if table.numel() <= 4 and not table.is_complex():
        return {int(abs(x)) for x in table.flatten().tolist() if x == x and abs(x) < 1e9}
    size = table.shape[-1]
    if table.dim() < 2 or table.shape[-2] != size:
        return set()
    first = table.reshape(-1, size, size)[0]
    found = {size - 2, (size - 3) // 2}
    for row in (0, size - 1):
        changes = (first[row, 1:] != first[row, :-1]).nonzero().flatten().tolist()
        found |= {abs(row - c) for c in changes} if len(changes) <= _FEW_CHANGES else set()
    return found


def _integers(value: Any) -> set[int]:
    """The sizes of all whole numbers in nested arguments."""
    if isinstance(value, dict):
        return _integers(list(value.values()))
    if isinstance(value, list | tuple):
        return {number for item in value for number in _integers(item)}
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
    return {abs(int(value))} if number and value == int(value) else set()


def _per_head(
    raw: Tensor, term: Term, lengths: Lengths, num_heads: int, rows: int, columns: int
) -> Tensor:
    """[heads or 1, rows, columns]; raises Unclear when the batch's rows differ."""
    lead = [extent_value(extent, lengths.sizes) for extent in term.shape[:-2]]
    if raw.dim() <= 2 or all(extent == 1 for extent in raw.shape[:-2]):
        return raw.reshape(1, *([1] * (2 - raw.dim())), *raw.shape[-2:]).expand(1, rows, columns)
    raw = raw.expand(*raw.shape[:-2], rows, columns)
    heads = raw.expand(*lead, rows, columns).reshape(-1, num_heads, rows, columns)
    if not torch.equal(heads, heads[:1].expand_as(heads)):
        raise Unclear
    first = heads[0]
    return first[:1] if torch.equal(first, first[:1].expand_as(first)) else first
