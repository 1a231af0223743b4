"""Running parts of a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from rewriter.capture.module import capture
from rewriter.program import Program
from rewriter.raising.evaluate import (
    UnboundInput,
    concrete_shape,
    depends_on,
    evaluate,
    random_value,
    sizes_of,
)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 3.0))

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        positions = torch.arange(x.shape[1]) + 0 * position_ids
        shape_only = torch.ones_like(x) * position_ids.unsqueeze(-1)
        return x.bfloat16() * self.scale.bfloat16(), positions, shape_only


@pytest.fixture(scope="module")
def program() -> Program:
    x, positions = torch.randn(2, 5, 4), torch.arange(5).expand(2, 5).contiguous()
    return capture(_Model(), {"x": x, "position_ids": positions})


def _outputs(program: Program) -> list[fx.Node]:
    return list(program.graph.output_node().args[0])


def _input(program: Program, name: str) -> fx.Node:
    node = program.placeholder(name)
    assert node is not None
    return node


def test_only_ancestors_run(program: Program) -> None:
    x = torch.randn(3, 7, 4)
    scaled = _outputs(program)[0]
    (value,) = evaluate(program, [scaled], {_input(program, "x"): x})
    torch.testing.assert_close(value, x.bfloat16() * 3.0)


def test_sizes_follow_bound_tensors(program: Program) -> None:
    positions = torch.zeros(3, 6, dtype=torch.int64)
    (value,) = evaluate(
        program, [_outputs(program)[1]], {_input(program, "position_ids"): positions}
    )
    assert torch.equal(value, torch.arange(6).expand(3, 6))


def test_constructors_need_no_data(program: Program) -> None:
    positions = torch.arange(6).expand(3, 6)
    (value,) = evaluate(
        program, [_outputs(program)[2]], {_input(program, "position_ids"): positions}
    )
    assert torch.equal(value, positions.unsqueeze(-1).expand(3, 6, 4).float())


def test_unbound_placeholder_is_named(program: Program) -> None:
    with pytest.raises(UnboundInput, match="'x'"):
        evaluate(program, [_outputs(program)[0]], {})


def test_widening_removes_narrow_casts(program: Program) -> None:
    x = torch.randn(1, 2, 4)
    binding = {_input(program, "x"): x}
    (value,) = evaluate(program, [_outputs(program)[0]], binding, widen=True)
    assert torch.equal(value, x * 3.0)


def test_dependence_is_on_values_not_sizes(program: Program) -> None:
    cache: dict[fx.Node, frozenset[str]] = {}
    depends = [depends_on(node, cache) for node in _outputs(program)]
    assert depends == [frozenset({"x"}), frozenset({"position_ids"}), frozenset({"position_ids"})]


def test_concrete_shapes(program: Program) -> None:
    node = _outputs(program)[0]
    sizes = sizes_of({_input(program, "x"): torch.empty(3, 7, 4)})
    assert concrete_shape(node, sizes) == (3, 7, 4)
    value = random_value(node, sizes, torch.Generator().manual_seed(0))
    assert (value.shape, value.dtype) == ((3, 7, 4), node.meta["val"].dtype)
