"""Which operators mix tokens, found by running the graph rather than by knowing operators.

Attention is replaced by a stand-in that treats each token alone. If then one token of one row is
changed and any other position's output changes, something besides attention mixes tokens. If a suffix
of the sequence run alone, at its true positions, gives other outputs than it gave inside the whole, the
model makes positions of its own instead of reading `position_ids`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from rewriter.dialect import OPS
from rewriter.dialect.attention import repeat_kv
from rewriter.program import Program

__all__ = ["mixing_operator", "own_positions"]

ATTENTION = OPS["attention"].overload
LENGTH, CHANGED, SPLIT = 13, 6, 5
"""Tokens of the probe, the one that is changed, and where the suffix starts."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Relative to the largest value: rounding differs with the batch's shape, mixing shows far above it."""


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
    }
)
"""Operators that move values and compute none."""


class _TokenAlone(fx.Interpreter):
    """Runs a graph with every attention replaced by a function of each token alone."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not ATTENTION:
            return super().call_function(target, args, kwargs)
        q, k, v = args[:3]
        level = q.mean(-1, keepdim=True) + repeat_kv(k, q.shape[1]).mean(-1, keepdim=True)
        return repeat_kv(v, q.shape[1]) + level


def probe_tokens(program: Program, batch_size: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids that every embedding of the program accepts, int64 [batch_size, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary(program), (batch_size, length), generator=generator)


def vocabulary(program: Program) -> int:
    """Rows of the smallest table that `input_ids` index."""
    ids = program.placeholder("input_ids")
    tables = [
        node.args[0].meta["val"].shape[0]
        for node in program.calls(torch.ops.aten.embedding.default)
        if node.args[1] is ids and isinstance(node.args[0], fx.Node) and "val" in node.args[0].meta
    ]
    config = program.meta.get("config")
    declared = getattr(config, "vocab_size", None) or 16
    return int(min(tables)) if tables else int(declared)


def _run(program: Program, ids: Tensor, start: int) -> _TokenAlone:
    positions = torch.arange(start, start + ids.shape[1]).expand(ids.shape[0], -1).contiguous()
    values = {"input_ids": ids, "position_ids": positions}
    interpreter = _TokenAlone(program.module)
    inputs = [values[node.name] for node in program.placeholders()]
    with torch.no_grad():
        interpreter.run(*inputs)
    return interpreter


def _differs(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return not torch.equal(a, b)
    if a.numel() == 0:
        return False
    tolerance = TOLERANCE.get(a.dtype, 5e-2) * a.abs().amax().float().item()
    return not torch.allclose(a.float(), b.float(), rtol=0.0, atol=tolerance, equal_nan=True)


def _probe_length(program: Program) -> int:
    """Tokens of the probe: the sequence length that capture had to fix, or `LENGTH`."""
    fixed = next((s.dims[-1] for s in program.signature.inputs if s.name == "input_ids"), None)
    return fixed if isinstance(fixed, int) and fixed > CHANGED else LENGTH


def _others(value: Tensor, length: int, row: int, token: int) -> Tensor | None:
    """The values at all positions but one; None when the token dimension cannot be told."""
    dims = [d for d, extent in enumerate(value.shape) if extent == length]
    if len(dims) != 1 or value.shape[0] != 2:
        return None
    kept = value.clone()
    kept.select(dims[0], token)[row] = 0
    return kept


def mixing_operator(program: Program) -> fx.Node | None:
    """The first operator besides attention through which one token changes another; None if none does.

    Args:
        program: a raised causal LM, inputs `input_ids` and maybe `position_ids`.
    """
    length = _probe_length(program)
    ids = probe_tokens(program, 2, length)
    changed = ids.clone()
    changed[0, CHANGED] = (changed[0, CHANGED] + 1) % max(vocabulary(program), 2)
    before, after = _run(program, ids, 0).env, _run(program, changed, 0).env
    output = program.graph.output_node()
    if not any(_mixed(before[n], after[n], length) for n in output.all_input_nodes):
        return None
    for node in program.graph.nodes:
        if node.op == "call_function" and _mixed(before[node], after[node], length):
            return _behind_views(node)
    return output


def _behind_views(node: fx.Node) -> fx.Node:
    """What computed a value that was only sliced or reshaped: its own length could not be compared."""
    while node.target in VIEWS and node.all_input_nodes[0].op == "call_function":
        node = node.all_input_nodes[0]
    return node


def _mixed(before: Any, after: Any, length: int) -> bool:
    if not isinstance(before, Tensor) or before.shape != getattr(after, "shape", None):
        return False
    a, b = _others(before, length, 0, CHANGED), _others(after, length, 0, CHANGED)
    return a is not None and b is not None and _differs(a, b)


def own_positions(program: Program) -> bool:
    """Whether a suffix at its true positions behaves otherwise than inside the whole sequence."""
    ids = probe_tokens(program, 2, LENGTH, seed=1)
    whole, suffix = _run(program, ids, 0).env, _run(program, ids[:, SPLIT:], SPLIT).env
    for node in program.graph.output_node().all_input_nodes:
        full, part = whole[node], suffix[node]
        dims = [d for d, extent in enumerate(full.shape) if extent == LENGTH]
        if len(dims) == 1 and _differs(full.narrow(dims[0], SPLIT, LENGTH - SPLIT), part):
            return True
    return False
