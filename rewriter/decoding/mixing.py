"""Which operators mix tokens, found by running the graph rather than by knowing operators.

Attention is replaced by a stand-in that treats each token alone, and in each row of a batch some tokens
are kept while the others are changed. If what comes out at a kept token moves, something besides
attention mixes tokens. The rows keep such sets that for any two tokens some row keeps the first and
changes the second. Tokens are changed twice: to other tokens at other positions, which reaches
comparisons and sorting, and to NaN, which no arithmetic can make too small to see.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rewriter.decoding.reach import reach
from rewriter.dialect import OPS
from rewriter.dialect.attention import repeat_kv
from rewriter.program import Program

__all__ = ["LONGEST_PROBE", "mixing_operator", "probe_tokens", "vocabulary"]

ATTENTION = OPS["attention"].overload
LENGTH = 13
"""Tokens of a probe where nothing asks for more."""

LONGEST_PROBE = 512
"""An operator that reaches further than this is not probed but declined."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Relative to the largest value: experts get other batches, which rounds differently."""

VIEWS = frozenset(
    {
        torch.ops.aten.slice.Tensor,
        torch.ops.aten.select.int,
        torch.ops.aten.view.default,
        torch.ops.aten.transpose.int,
        torch.ops.aten.permute.default,
        torch.ops.aten.unsqueeze.default,
        torch.ops.aten.squeeze.dim,
        torch.ops.aten.expand.default,
        operator.getitem,
    }
)
"""Operators that move values and compute none."""


class TokenAlone(fx.Interpreter):
    """Runs a graph with every attention replaced by a function of each token alone.

    Args:
        program: a raised causal LM.
        poison: bool [batch_size, q_len]; where True, whatever is first computed from a token is NaN.
    """

    def __init__(self, program: Program, poison: Tensor | None = None) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self._poison, self._ids = poison, set[fx.Node]()

    def run_node(self, n: fx.Node) -> Any:
        """Also poison the floating-point values that are made of token ids."""
        value = super().run_node(n)
        if self._poison is None or not isinstance(value, Tensor):
            return value
        if n.name != "input_ids" and self._ids.isdisjoint(n.all_input_nodes):
            return value
        if value.is_floating_point():
            return _poisoned(value, self._poison)
        self._ids.add(n)
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stand-in for attention; everything else as it is."""
        if target is not ATTENTION:
            return super().call_function(target, args, kwargs)
        q, k, v = args[:3]
        level = q.mean(-1, keepdim=True) + repeat_kv(k, q.shape[1]).mean(-1, keepdim=True)
        return repeat_kv(v, q.shape[1]) + level


@dataclass(frozen=True)
class _Probe:
    """Values of all nodes before and after the tokens outside `kept` were changed in two ways."""

    kept: Tensor
    before: dict[fx.Node, Any]
    changes: tuple[dict[fx.Node, Any], ...]

    def mixed(self, node: fx.Node) -> bool:
        """Whether a kept token's value moved; False where tokens cannot be told apart."""
        before = by_token(self.before[node], *self.kept.shape)
        if before is None:
            return False
        for change in self.changes:
            after = by_token(change[node], *self.kept.shape)
            if after is not None and differs(before[self.kept], after[self.kept]):
                return True
        return False

    def origin(self, node: fx.Node) -> fx.Node:
        """Behind views whose inputs could not be compared: what mixed, whatever length it gave."""
        while node.target in VIEWS:
            source = node.all_input_nodes[0]
            told_apart = by_token(self.before.get(source), *self.kept.shape) is not None
            if told_apart or source.op != "call_function":
                break
            node = source
        return node


def mixing_operator(program: Program) -> fx.Node | None:
    """The first operator besides attention through which one token changes another; None if none does.

    Args:
        program: a raised causal LM, inputs `input_ids` and maybe `position_ids`.
    """
    furthest, offset = reach(program)
    if furthest >= LONGEST_PROBE:
        return offset
    probe = _probe(program, max(LENGTH, furthest + 2))
    output = program.graph.output_node()
    if not any(probe.mixed(node) for node in output.all_input_nodes):
        return None
    for node in program.graph.nodes:
        if node.op == "call_function" and probe.mixed(node):
            return probe.origin(node)
    return output


def probe_tokens(program: Program, batch_size: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids that every embedding of the program accepts, int64 [batch_size, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary(program) or 16, (batch_size, length), generator=generator)


def vocabulary(program: Program) -> int | None:
    """Rows of the smallest table that `input_ids` index; None when nothing tells."""
    ids = program.placeholder("input_ids")
    tables = [
        node.args[0].meta["val"].shape[0]
        for node in program.calls(torch.ops.aten.embedding.default)
        if node.args[1] is ids and isinstance(node.args[0], fx.Node) and "val" in node.args[0].meta
    ]
    declared = getattr(program.meta.get("config"), "vocab_size", None)
    return int(min(tables)) if tables else declared


def run_alone(
    program: Program, ids: Tensor, positions: Tensor, poison: Tensor | None = None
) -> dict[fx.Node, Any]:
    """The value of every node when attention treats each token alone."""
    interpreter = TokenAlone(program, poison)
    given = {"input_ids": ids, "position_ids": positions}
    with torch.no_grad():
        interpreter.run(*[given[node.name] for node in program.placeholders()])
    return interpreter.env


def differs(a: Tensor, b: Tensor) -> bool:
    """Whether two values differ by more than rounding; a NaN on one side only is a difference."""
    if not a.is_floating_point():
        return not torch.equal(a, b)
    finite = a[a.isfinite()]
    if finite.numel() == 0:
        return not torch.equal(a.isnan(), b.isnan())
    tolerance = TOLERANCE.get(a.dtype, 5e-2) * finite.abs().amax().item()
    return not torch.allclose(a.double(), b.double(), rtol=0.0, atol=tolerance, equal_nan=True)


def by_token(value: Any, batch_size: int, length: int) -> Tensor | None:
    """As [batch_size, length, ...]; None when it cannot be told which dimension the tokens are."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return None
    if value.shape[:2] == (batch_size, length):
        return value
    if value.shape[0] == batch_size * length:
        return value.unflatten(0, (batch_size, length))
    dims = [d for d, extent in enumerate(value.shape) if d and extent == length]
    if value.shape[0] != batch_size or len(dims) != 1:
        return None
    return value.movedim(dims[0], 1)


def _probe(program: Program, length: int) -> _Probe:
    fixed_rows, fixed_length = _fixed(program)
    limit = program.meta.get("max_positions")
    kept = _kept_sets(fixed_length or min(length, limit or length))[:fixed_rows]
    ids = probe_tokens(program, *kept.shape)
    device = next((p.device for p in program.module.parameters()), ids.device)
    other = (ids + 1 + probe_tokens(program, *kept.shape, seed=1)) % (vocabulary(program) or 16)
    positions = torch.arange(kept.shape[1]).expand(kept.shape).contiguous()
    elsewhere = positions
    if limit:
        generator = torch.Generator().manual_seed(2)
        elsewhere = torch.randint(0, limit, kept.shape, generator=generator)
    kept, ids, other, positions, elsewhere = (
        t.to(device) for t in (kept, ids, other, positions, elsewhere)
    )
    changed = (torch.where(kept, ids, other), torch.where(kept, positions, elsewhere))
    before = run_alone(program, ids, positions)
    after = (run_alone(program, *changed), run_alone(program, ids, positions, ~kept))
    return _Probe(kept, before, after)


def _kept_sets(length: int) -> Tensor:
    """bool [rows, length]: for any two tokens, some row keeps the first and not the second."""
    tokens, bits = torch.arange(length), max(length - 1, 1).bit_length()
    ones = torch.stack([(tokens >> bit) % 2 == 1 for bit in range(bits)])
    return torch.cat([ones, ~ones])


def _fixed(program: Program) -> tuple[int | None, int | None]:
    """Batch size and length of `input_ids` where capture had to fix them."""
    dims = next((s.dims for s in program.signature.inputs if s.name == "input_ids"), (None, None))
    rows, length = (dim if isinstance(dim, int) else None for dim in dims)
    return rows, length


def _poisoned(value: Tensor, poison: Tensor) -> Tensor:
    aligned = by_token(value, *poison.shape)
    if aligned is None or aligned.data_ptr() != value.data_ptr() or aligned.dim() < 2:
        return value
    mask = poison.view(*poison.shape, *[1] * (aligned.dim() - 2))
    return aligned.masked_fill(mask, float("nan")).view(value.shape)
